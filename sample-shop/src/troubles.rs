//! Reports what keeps the parts of a process from working.

use std::{collections::BTreeSet, time::Duration};

use annals::{Health, health::State};
use tokio_util::sync::CancellationToken;

/// How long a problem must last before it is reported.
const TROUBLE_LASTS: Duration = Duration::from_secs(2);

/// Reports why nothing moves forward, once for each reason that persists. Meanwhile the parts keep retrying.
pub async fn report_troubles(health: Health, shutdown: CancellationToken) -> Result<(), String> {
    let mut reported = BTreeSet::new();
    let mut before = BTreeSet::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(TROUBLE_LASTS) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let reasons = health.parts().into_values().filter_map(|state| match state {
            State::Trouble(reason) => Some(reason),
            _ => None,
        });
        let now: BTreeSet<String> = reasons.collect();
        for reason in now.intersection(&before) {
            if reported.insert(reason.clone()) {
                tracing::error!("waiting, and trying again: {reason}");
            }
        }
        reported.retain(|reason| now.contains(reason));
        before = now;
    }
}
