//! Finds work that a participant has to do again. A recovery can copy an answer to a saga from a topic into the log,
//! although other events of the same commit may be lost. At its next start, the service then does the work of that
//! answer again. This module looks up the commands for that work.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use annals::{
    Archive, Position,
    archive::{Contents, Stored},
    bus::Ends,
    saga::{Owed, Reply, StepKey, StepRef},
};
use annals_kafka::KafkaBus;
use serde_json::Value;

use super::checkpoint::checkpoint;
use crate::{failure::Failure, progress, store::restore};

/// The maximum number of documents that one commit writes.
const PART: usize = 1_000;

/// The answers to sagas whose work the participants must do again, each with its position.
#[derive(Default)]
pub(super) struct OwedAnswers(BTreeMap<StepKey, (Position, Reply)>);

impl OwedAnswers {
    /// Records an answer if other events of the same commit may be missing from the log. `is_whole` is true if the log
    /// certainly contains the whole commit.
    pub fn note(&mut self, event: &Stored<'_>, is_whole: bool) {
        let Some((key, reply)) = StepKey::answered(event) else { return };
        if !is_whole {
            // A second answer to a step repeats the first answer.
            self.0.entry(key).or_insert((event.position, reply));
        } else if let StepRef::Undo(step) = key.at {
            // The undo of the step is complete, so the work of the step need not be done again.
            self.0.remove(&StepKey { at: StepRef::Forward(step), ..key });
        }
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Writes the documents that make the services do the work again. Returns the steps whose commands are no longer in
    /// any topic.
    pub async fn write(
        mut self,
        services: &BTreeSet<String>,
        archive: &Arc<dyn Archive>,
        bus: &KafkaBus,
    ) -> Result<Vec<String>, Failure> {
        let mut owed = BTreeMap::new();
        // A command that was parked before the backup has a lower offset than the one from which the service continues.
        for from_the_beginning in [false, true] {
            for service in services {
                if !self.0.is_empty() {
                    self.look_up(service, from_the_beginning, archive, bus, &mut owed).await?;
                }
            }
        }
        let documents: Vec<_> = owed.into_iter().map(|((service, _), owed)| owed.document(service)).collect();
        for part in documents.chunks(PART) {
            restore(&**archive, Contents { events: Vec::new(), documents: part.to_vec() }).await?;
        }
        let gone = |StepKey { stream, at, call }| format!("{stream}, {at}, call {call}");
        Ok(self.0.into_keys().map(gone).collect())
    }

    /// Finds the commands of a service in its inbox: either from the offset at which the restored service continues, or
    /// in the whole inbox.
    async fn look_up<'a>(
        &mut self,
        service: &'a str,
        from_the_beginning: bool,
        archive: &Arc<dyn Archive>,
        bus: &KafkaBus,
        owed: &mut BTreeMap<(&'a str, Position), Owed>,
    ) -> Result<(), Failure> {
        let topic = format!("{service}.commands");
        let mut since = Ends::default();
        let mut number = 0;
        while !from_the_beginning
            && let Some(document) = checkpoint(archive, &format!("{topic}/{topic}/{number}")).await?
        {
            let found: Value = serde_json::from_str(&document.body)?;
            since.set(&topic, number, found["next"].as_i64().unwrap_or(0));
            number += 1;
        }
        let Some(mut contents) = bus.contents_since(&topic, &since).await? else { return Ok(()) };
        let bar = progress::topic_bar("look up", &contents);
        while let Some(delivery) = contents.next().await? {
            bar.inc(1);
            let Ok(message) = delivery.message else { continue };
            let Some(key) = StepKey::asked(service, &message) else { continue };
            if let Some((position, reply)) = self.0.remove(&key) {
                owed.insert((service, position), Owed { message, reply, answered_at: position });
            }
        }
        bar.finish_and_clear();
        Ok(())
    }
}
