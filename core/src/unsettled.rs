//! Whether a commit holds whose outcome is unknown.

use std::collections::HashMap;

use uuid::Uuid;

use crate::{
    commit::Committed,
    event::{Position, StreamId, Version},
    store::{EventStore, StoreError},
};

/// Events read in one go.
const PAGE: usize = 1_000;

/// A commit with an unknown outcome, known again by its events. It expected each stream at a version, so if it holds, its events
/// stand exactly where they were staged, however many they are and whatever came after them.
#[derive(Clone, Debug)]
pub(crate) struct Unsettled {
    /// What was staged on each stream. At least one of them has commands.
    pub streams: Vec<Staged>,
}

/// What was staged on one stream.
#[derive(Clone, Debug)]
pub(crate) struct Staged {
    pub stream: StreamId,
    /// The version before the first event.
    pub base: Version,
    /// The version of the last event, which is `base` if there is none.
    pub last: Version,
    /// The first event of each command. All of them are looked for: another process may have been sent one of the commands, too.
    pub commands: HashMap<Version, Uuid>,
}

impl Unsettled {
    /// What the commit came to, if it holds. `None`: it does not hold, or not yet, as when the server still works on it.
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

impl Staged {
    /// The position of the last event, if all commands stand where they were staged.
    async fn find(&self, store: &dyn EventStore) -> Result<Option<Position>, StoreError> {
        let mut at = self.base;
        let mut position = Position::START;
        while at < self.last {
            let page = store.read_stream(&self.stream, at, PAGE).await?;
            if page.first().is_none_or(|event| event.version > self.last) {
                return Ok(None);
            }
            for event in page.into_iter().take_while(|event| event.version <= self.last) {
                if self.commands.get(&event.version).is_some_and(|id| *id != event.id) {
                    return Ok(None);
                }
                (at, position) = (event.version, event.position);
            }
        }
        Ok(Some(position))
    }
}
