//! How far the relay of a service has come, and by which names of lanes its messages are known.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    checkpoint::{CHECKPOINTS, Checkpoint},
    commit::{Commit, CommitError, DocumentKey, Put},
    event::{Position, StreamId},
    store::{EventStore, Scan, StoreError},
    subscription::lane_of,
};

/// Documents read at once.
const PAGE: usize = 500;
/// What follows the service in the name of its relay.
const RELAY: &str = ".relay";

/// How far the relay of a service has come.
#[derive(Clone, Debug, PartialEq)]
pub struct Relayed {
    log: Arc<str>,
    /// Of each lane.
    checkpoints: Vec<Position>,
}

impl Relayed {
    /// Of every service whose relay has run on this store, by the name of the service.
    pub async fn on(store: &dyn EventStore) -> Result<BTreeMap<String, Self>, StoreError> {
        let mut services: BTreeMap<String, BTreeMap<u32, Position>> = BTreeMap::new();
        let mut after: Arc<str> = "".into();
        loop {
            let page = store.scan(CHECKPOINTS, &Scan::After(after), PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.key.id.clone();
            for document in &page {
                let named = document.key.id.rsplit_once('/');
                let of_relay = named.and_then(|(name, lane)| Some((name.strip_suffix(RELAY)?, lane.parse().ok()?)));
                let Some((service, lane)) = of_relay else { continue };
                let checkpoint: Checkpoint = serde_json::from_str(&document.body)
                    .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
                services.entry(service.to_owned()).or_default().insert(lane, Position(checkpoint.next));
            }
        }
        let Some(log) = known_name(store).await? else { return Ok(BTreeMap::new()) };
        let relayed = |lanes: BTreeMap<u32, Position>| Self {
            log: log.as_str().into(),
            checkpoints: lanes.into_values().collect(),
        };
        Ok(services.into_iter().map(|(service, lanes)| (service, relayed(lanes))).collect())
    }

    /// The bus has taken all that comes of the events of this stream up to here, but for what is parked.
    pub fn up_to(&self, stream: &StreamId) -> Position {
        self.checkpoints[self.lane(stream) as usize]
    }

    /// The same for all streams.
    pub fn all_up_to(&self) -> Position {
        self.checkpoints.iter().copied().min().unwrap_or(Position::START)
    }

    /// What [`Message::lane`](crate::Message::lane) says of the messages that come of a stream's events.
    pub fn label(&self, stream: &StreamId) -> Arc<str> {
        label(self.lane(stream), &self.log)
    }

    /// Whether a message says that it came from this log, by any lane.
    pub fn is_of_this_log(&self, lane: &str) -> bool {
        lane.split_once('@').is_some_and(|(_, log)| log == &*self.log)
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

pub(crate) fn label(lane: u32, log: &str) -> Arc<str> {
    format!("{lane}@{log}").into()
}

async fn known_name(store: &dyn EventStore) -> Result<Option<String>, StoreError> {
    let key = DocumentKey::new("log", "name");
    let Some(found) = store.document(&key).await? else { return Ok(None) };
    let name = serde_json::from_str(&found.body);
    name.map(Some).map_err(|error| StoreError::Corrupt(format!("document {key}: {error}")))
}

/// What tells this log from others that have the same service: an earlier one that was given up, say, whose messages are still
/// in a topic. Drawn by the first relay.
pub(crate) async fn name_of_log(store: &dyn EventStore) -> Result<String, StoreError> {
    let key = DocumentKey::new("log", "name");
    loop {
        if let Some(name) = known_name(store).await? {
            return Ok(name);
        }
        let name = format!("\"{:016x}\"", uuid::Uuid::new_v4().as_u64_pair().0);
        let put = Put { key: key.clone(), expected: Some(0), body: Some(name.into()), due: None };
        match store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await {
            // Another one may have been first.
            Ok(_) | Err(CommitError::DocumentConflict { .. }) => {}
            Err(error) => return Err(StoreError::Unavailable(error.to_string())),
        }
    }
}
