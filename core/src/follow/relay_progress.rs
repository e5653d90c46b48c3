//! The progress of the relay of a service, and the lane names that the messages of the relay carry.

use std::{collections::BTreeMap, sync::Arc};

use futures::TryStreamExt;

use crate::{
    base::name::RELAY,
    bus::Ends,
    event::{Position, StreamId},
    follow::checkpoint::{CHECKPOINTS, Checkpoint, lane_of},
    store::{
        EventStore, StoreError,
        names::{LogNames, log_of},
        pages,
    },
};

/// The progress of the relay of a service.
#[derive(Clone, Debug, PartialEq)]
pub struct RelayProgress {
    names: LogNames,
    /// The checkpoint of each lane.
    checkpoints: Vec<Position>,
    taken: Ends,
}

impl RelayProgress {
    /// Returns the progress of every relay that has run on this store, by the name of its service.
    pub async fn on(store: &dyn EventStore) -> Result<BTreeMap<String, Self>, StoreError> {
        let mut services: BTreeMap<String, (BTreeMap<u32, Position>, Ends)> = BTreeMap::new();
        let mut documents = pages::collection(store, CHECKPOINTS, "");
        while let Some(document) = documents.try_next().await? {
            let named = document.key.id.rsplit_once('/');
            let of_relay = named.and_then(|(name, lane)| Some((name.strip_suffix(RELAY)?, lane.parse().ok()?)));
            let Some((service, lane)) = of_relay else { continue };
            // This id has the form `GROUP/TOPIC/PARTITION`, and the name of the topic ends in `.relay`. The
            // checkpoint does not belong to a relay.
            if service.contains('/') {
                continue;
            }
            let checkpoint: Checkpoint = serde_json::from_str(&document.body)
                .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
            let (lanes, taken) = services.entry(service.to_owned()).or_default();
            lanes.insert(lane, Position(checkpoint.next));
            // The checkpoint of every lane records the ends up to which the bus has accepted the messages of its
            // process.
            taken.reach(&checkpoint.taken);
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

    /// The ends up to which the bus had accepted messages at the last checkpoint of the relay. Messages after these
    /// ends were sent after that checkpoint.
    pub fn taken(&self) -> &Ends {
        &self.taken
    }

    /// The names of the log.
    pub fn names(&self) -> &LogNames {
        &self.names
    }

    /// Returns the position up to which the bus has accepted the messages of all events of this stream, except parked
    /// messages.
    pub fn up_to(&self, stream: &StreamId) -> Position {
        self.checkpoints[self.lane(stream) as usize]
    }

    /// Like [`up_to`](Self::up_to), for all streams.
    pub fn all_up_to(&self) -> Position {
        self.checkpoints.iter().copied().min().unwrap_or(Position::START)
    }

    /// Returns the [`Message::lane`](crate::Message::lane) that messages for an event of this stream carry.
    pub fn label(&self, stream: &StreamId, position: Position) -> Arc<str> {
        self.names.label(self.lane(stream), position)
    }

    /// Returns whether the lane of a message belongs to this log.
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
