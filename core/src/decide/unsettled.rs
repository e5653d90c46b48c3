//! Finds out whether a commit with an unknown outcome was stored.

use std::collections::HashMap;

use futures::TryStreamExt;
use uuid::Uuid;

use crate::{
    commit::Committed,
    event::{Position, StreamId, Version},
    store::{EventStore, StoreError, pages},
};

/// A commit with an unknown outcome, which is recognised by its events. The commit expected each stream at a certain
/// version. If the commit was stored, its events therefore have exactly the versions for which they were staged, no
/// matter how many events there are and which events follow.
#[derive(Clone, Debug)]
pub(crate) struct Unsettled {
    /// The staged part of each stream. At least one stream has commands.
    pub streams: Vec<UnsettledStream>,
}

/// The staged events of one stream.
#[derive(Clone, Debug)]
pub(crate) struct UnsettledStream {
    pub stream: StreamId,
    /// The version of the stream before the first event.
    pub base: Version,
    /// The version of the last event, or `base` if there are no events.
    pub last: Version,
    /// The first event of each command. All first events are checked, because another process may also have received
    /// one of the commands.
    pub commands: HashMap<Version, Uuid>,
}

impl Unsettled {
    /// Returns the result of the commit if the commit was stored. `None` means that the commit was not stored, or not
    /// yet, for example because the server is still processing the commit.
    pub async fn find(&self, store: &dyn EventStore) -> Result<Option<Committed>, StoreError> {
        let mut position = Position::START;
        for staged in self.streams.iter().filter(|staged| staged.last > staged.base) {
            match staged.find(store).await? {
                Some(last) => position = position.max(last),
                None => return Ok(None),
            }
        }
        let versions = self.streams.iter().map(|staged| staged.last).collect();
        Ok(Some(Committed { position, versions, recorded_at: None }))
    }
}

impl UnsettledStream {
    /// Returns the position of the last event, if the first events of all commands have the versions for which they
    /// were staged.
    async fn find(&self, store: &dyn EventStore) -> Result<Option<Position>, StoreError> {
        let mut at = self.base;
        let mut position = Position::START;
        let mut events = pages::history(store, &self.stream, self.base);
        while at < self.last {
            let Some(event) = events.try_next().await? else { return Ok(None) };
            let is_other = self.commands.get(&event.version).is_some_and(|id| *id != event.id);
            if is_other || event.version > self.last {
                return Ok(None);
            }
            at = event.version;
            position = event.position;
        }
        Ok(Some(position))
    }
}
