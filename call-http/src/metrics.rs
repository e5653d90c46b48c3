//! The metrics that Prometheus reads at `/metrics`.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use annals::{
    EventStore, Health, Scan,
    checkpoint::{CHECKPOINTS, Checkpoint},
    health::State,
    saga::Status,
};
use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use tokio::time::timeout;

/// How long the store may take to return its status.
const STORE_TIME_MAX: Duration = Duration::from_secs(2);
/// The maximum number of checkpoints shown: more than all services on one store have together.
const CHECKPOINTS_MAX: usize = 1_000;
/// The upper bounds of the buckets for request durations, in seconds.
const SECONDS: [f64; 14] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// The metrics of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    seconds: HistogramVec,
    /// The number of requests in progress.
    pub(crate) in_hand: IntGauge,
    sagas: IntCounterVec,
    parts: IntGaugeVec,
    lag: IntGaugeVec,
    head: IntGauge,
    readers_wait: IntGauge,
    readers_wait_for: GaugeVec,
    lost_end: IntGauge,
    store_up: IntGauge,
}

impl Metrics {
    /// Creates the metrics, all at zero.
    ///
    /// # Errors
    /// Fails if a metric is not valid, which is a fault of this crate.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok(counters)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauges.clone()))?;
            Ok(gauges)
        };
        let gauge = |name: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let readers_wait_for = GaugeVec::new(
            Opts::new(
                "annals_log_readers_wait_seconds",
                "Age of the oldest transaction that readers of the log wait for, by its pid; 0 if it is prepared.",
            ),
            &["pid"],
        )?;
        registry.register(Box::new(readers_wait_for.clone()))?;
        let options = HistogramOpts::new(
            "annals_http_request_seconds",
            "Time to answer a request, including the time that the request asked to wait.",
        );
        let seconds = HistogramVec::new(options.buckets(SECONDS.to_vec()), &["method", "route"])?;
        registry.register(Box::new(seconds.clone()))?;
        Ok(Arc::new(Self {
            requests: counters("annals_http_requests_total", "Requests answered.", &["method", "route", "status"])?,
            seconds,
            in_hand: gauge("annals_http_requests_in_progress", "Requests that are not answered yet.")?,
            sagas: counters(
                "annals_sagas_ended_total",
                "Sagas that ended or got stuck since this process started, on any instance.",
                &["saga", "status"],
            )?,
            parts: gauges("annals_part_state", "1 for the state that a part is in.", &["part", "state"])?,
            lag: gauges(
                "annals_lag_events",
                "How far a reader of the log is behind its head, in positions.",
                &["reader"],
            )?,
            head: gauge("annals_log_head_position", "The last position of the log that readers can see.")?,
            readers_wait: gauge(
                "annals_log_readers_wait",
                "1 while readers of the log wait for an older transaction.",
            )?,
            readers_wait_for,
            lost_end: gauge(
                "annals_log_lost_end_position",
                "Position of the last event that this process read before the log lost its end; 0 if the log has \
                 lost nothing.",
            )?,
            store_up: gauge("annals_store_up", "1 if the store answers.")?,
            registry,
        }))
    }

    /// Counts an answer.
    pub(crate) fn answered(&self, method: &str, route: &str, status: u16, elapsed: Duration) {
        self.requests.with_label_values(&[method, route, status.to_string().as_str()]).inc();
        self.seconds.with_label_values(&[method, route]).observe(elapsed.as_secs_f64());
    }

    /// The registry, to which a service adds metrics of its own.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts the end of a saga.
    pub(crate) fn saga_ended(&self, category: &str, status: Status) {
        let status = match status {
            Status::Completed => "completed",
            Status::Compensated => "compensated",
            Status::Stuck => "stuck",
            Status::Running | Status::Compensating => return,
        };
        self.sagas.with_label_values(&[category.trim_start_matches("saga."), status]).inc();
    }

    /// Returns all metrics in the format of Prometheus, with the current state of the store and of the parts.
    ///
    /// # Errors
    /// Fails if a metric is not valid.
    pub async fn text(&self, store: &Arc<dyn EventStore>, health: &Health) -> Result<String, prometheus::Error> {
        self.parts.reset();
        for (part, state) in health.parts() {
            self.parts.with_label_values(&[part.as_str(), state_name(&state)]).set(1);
        }
        let up = timeout(STORE_TIME_MAX, self.look_at(store)).await.is_ok_and(|looked| looked.is_ok());
        self.store_up.set(up.into());
        let mut families = self.registry.gather();
        families.extend(counted(health)?);
        TextEncoder::new().encode_to_string(&families)
    }

    async fn look_at(&self, store: &Arc<dyn EventStore>) -> Result<(), annals::StoreError> {
        let status = store.status().await?;
        self.head.set(status.head.0);
        self.readers_wait.set(status.waits_for.is_some().into());
        self.lost_end.set(status.lost_end.as_ref().map_or(0, |lost| lost.position.0));
        self.readers_wait_for.reset();
        if let Some(writer) = &status.waits_for {
            let pid = writer.pid.unwrap_or(0).to_string();
            self.readers_wait_for.with_label_values(&[&pid]).set(writer.age.as_secs_f64());
        }
        let checkpoints = store.scan(CHECKPOINTS, &Scan::After("".into()), CHECKPOINTS_MAX).await?;
        self.lag.reset();
        for document in checkpoints {
            // Only the bus knows where a topic ends, so the lag of a topic's checkpoint is not shown here.
            let checkpoint = serde_json::from_str::<Checkpoint>(&document.body).ok();
            if let Some(Checkpoint { next, incarnation: None, .. }) = checkpoint {
                self.lag.with_label_values(&[&*document.key.id]).set((status.head.0 - next).max(0));
            }
        }
        Ok(())
    }
}

/// The counters of the parts, each with its name and its labels.
fn counted(health: &Health) -> Result<Vec<prometheus::proto::MetricFamily>, prometheus::Error> {
    let registry = Registry::new();
    let mut counters: BTreeMap<&str, IntCounterVec> = BTreeMap::new();
    for (counter, count) in health.counters() {
        let names: Vec<_> = counter.labels.iter().map(|(name, _)| *name).collect();
        let values: Vec<_> = counter.labels.iter().map(|(_, value)| value.as_str()).collect();
        let counters = match counters.entry(counter.name) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let counters = IntCounterVec::new(Opts::new(counter.name, counter.help()), &names)?;
                registry.register(Box::new(counters.clone()))?;
                new.insert(counters)
            }
        };
        counters.with_label_values(&values).inc_by(count);
    }
    Ok(registry.gather())
}

fn state_name(state: &State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Fine => "fine",
        State::NeedsAttention(_) => "needs_attention",
        State::Elsewhere(_) => "elsewhere",
        State::Trouble(_) => "trouble",
        State::Stopped => "stopped",
        State::Failed(_) => "failed",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use annals::{
        Append, Commit, Expected, Handler, HandlerError, LocalBus, MemoryStore, Message, Metadata, NewEvent, Runtime,
        Service, StreamId, Subscription, Terminal, Work,
    };
    use async_trait::async_trait;
    use uuid::Uuid;

    use super::*;

    struct Fails;

    #[async_trait]
    impl Handler for Fails {
        async fn handle(&self, _: &Message, _: &mut Work) -> Result<(), HandlerError> {
            Err("not today".to_owned()).terminal()
        }
    }

    #[tokio::test]
    async fn counters_of_the_parts_are_shown_without_ids() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let mut runtime = Runtime::new();
        let service = Service::new("shelf", store.clone()).subscribe(Subscription::new("fails", Fails));
        runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
        let event = NewEvent {
            id: Uuid::new_v4(),
            type_name: "stock.received".into(),
            schema_version: 1,
            data: "{}".into(),
            metadata: Metadata::default(),
        };
        let stream = StreamId::new("stock", "84029E").unwrap();
        let append = Append { stream, expected: Expected::Any, events: vec![event] };
        store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
        let metrics = Metrics::new().unwrap();
        let health = runtime.health();
        let shown = timeout(Duration::from_secs(30), async {
            loop {
                let text = metrics.text(&store, &health).await.unwrap();
                if text.contains("annals_dead_letters_total") {
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let shown = shown.await.unwrap();
        assert!(shown.contains("annals_dead_letters_total{subscription=\"fails\"} 1"), "{shown}");
        assert!(shown.contains("annals_part_state{part=\"fails/0\",state=\"needs_attention\"} 1"), "{shown}");
        assert!(!shown.contains("84029E"), "{shown}");
    }
}
