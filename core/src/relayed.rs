//! How far the relay of a service has come, and by which names of lanes its messages are known.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    bus::Ends,
    checkpoint::{CHECKPOINTS, Checkpoint},
    event::{Position, StreamId},
    log_names::{LogNames, log_of},
    name::RELAY,
    store::{EventStore, Scan, StoreError},
    subscription::lane_of,
};

/// Documents read at once.
const PAGE: usize = 500;

/// How far the relay of a service has come.
#[derive(Clone, Debug, PartialEq)]
pub struct Relayed {
    names: LogNames,
    /// Of each lane.
    checkpoints: Vec<Position>,
    taken: Ends,
}

impl Relayed {
    /// Of every service whose relay has run on this store, by the name of the service.
    pub async fn on(store: &dyn EventStore) -> Result<BTreeMap<String, Self>, StoreError> {
        let mut services: BTreeMap<String, (BTreeMap<u32, Position>, Ends)> = BTreeMap::new();
        let mut after: Arc<str> = "".into();
        loop {
            let page = store.scan(CHECKPOINTS, &Scan::After(after), PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.key.id.clone();
            for document in &page {
                let named = document.key.id.rsplit_once('/');
                let of_relay = named.and_then(|(name, lane)| Some((name.strip_suffix(RELAY)?, lane.parse().ok()?)));
                let Some((service, lane)) = of_relay else { continue };
                // `GROUP/TOPIC/PARTITION`, of a topic that is called as a relay.
                if service.contains('/') {
                    continue;
                }
                let checkpoint: Checkpoint = serde_json::from_str(&document.body)
                    .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
                let (lanes, taken) = services.entry(service.to_owned()).or_default();
                lanes.insert(lane, Position(checkpoint.next));
                // All lanes note what the same process has sent.
                taken.reach(&checkpoint.taken);
            }
        }
        let names = LogNames::of(store).await?;
        if names.segments().is_empty() {
            return Ok(BTreeMap::new());
        }
        let relayed = |(lanes, taken): (BTreeMap<u32, Position>, Ends)| Self {
            names: names.clone(),
            checkpoints: lanes.into_values().collect(),
            taken,
        };
        Ok(services.into_iter().map(|(service, progress)| (service, relayed(progress))).collect())
    }

    /// Up to where the bus had taken messages when the relay last noted it. What lies behind, it has sent since.
    pub fn taken(&self) -> &Ends {
        &self.taken
    }

    /// The names of the log.
    pub fn names(&self) -> &LogNames {
        &self.names
    }

    /// The bus has taken all that comes of the events of this stream up to here, but for what is parked.
    pub fn up_to(&self, stream: &StreamId) -> Position {
        self.checkpoints[self.lane(stream) as usize]
    }

    /// The same for all streams.
    pub fn all_up_to(&self) -> Position {
        self.checkpoints.iter().copied().min().unwrap_or(Position::START)
    }

    /// What [`Message::lane`](crate::Message::lane) says of the messages that come of a stream's event.
    pub fn label(&self, stream: &StreamId, position: Position) -> Arc<str> {
        self.names.label(self.lane(stream), position)
    }

    /// Whether a message says that it came from this log, by any lane.
    pub fn is_of_this_log(&self, lane: &str) -> bool {
        log_of(lane).is_some_and(|log| self.names.knows(log))
    }

    fn lane(&self, stream: &StreamId) -> u32 {
        match self.checkpoints.len() {
            1 => 0,
            lanes => lane_of(stream.as_str(), lanes as u32),
        }
    }
}

/// The name of a service's relay.
pub(crate) fn relay_of(service: &str) -> Arc<str> {
    format!("{service}{RELAY}").into()
}
