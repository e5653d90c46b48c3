//! Simulates clients. Each client makes one request at a time and runs on its own task, as in a server.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::Failure;

/// Runs `ask` on all items, `clients` of them at a time. Returns the duration of each call and the total duration.
pub async fn all<T, F, D>(what: Vec<T>, clients: usize, ask: F) -> Result<(Vec<Duration>, Duration), Failure>
where
    T: Send + 'static,
    F: Fn(T) -> D + Clone + Send + 'static,
    D: Future<Output = Result<(), String>> + Send,
{
    let count = what.len();
    let queue = Arc::new(Mutex::new(what.into_iter()));
    let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..clients.min(count) {
        let next = next.clone();
        let ask = ask.clone();
        tasks.spawn(async move {
            let mut took = Vec::new();
            while let Some(one) = next() {
                let asked = Instant::now();
                ask(one).await?;
                took.push(asked.elapsed());
            }
            Ok::<_, String>(took)
        });
    }
    let mut latencies = Vec::with_capacity(count);
    while let Some(took) = tasks.join_next().await {
        latencies.extend(took??);
    }
    Ok((latencies, started.elapsed()))
}
