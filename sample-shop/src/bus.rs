//! Opens the bus that a URL names.

use std::sync::Arc;

use annals::{Bus, LocalBus};
#[cfg(feature = "kafka")]
use annals_kafka::KafkaBus;

use crate::{Failure, arguments::BusUrl};

/// The number of partitions per topic of the local bus.
const LOCAL_PARTITIONS: u32 = 4;

/// Opens the bus that `url` names.
///
/// # Errors
/// Returns an error if the bus cannot be reached.
pub async fn open(url: &BusUrl) -> Result<Arc<dyn Bus>, Failure> {
    match url {
        BusUrl::Local => Ok(Arc::new(LocalBus::new(LOCAL_PARTITIONS))),
        #[cfg(feature = "kafka")]
        BusUrl::Kafka(settings) => Ok(Arc::new(KafkaBus::connect(settings.clone()).await?)),
    }
}
