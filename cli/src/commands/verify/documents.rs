//! Checks that the documents of the engine can be read and match the log.

use annals::{
    Archive, Document, StreamId, Version,
    checkpoint::{CHECKPOINTS, Checkpoint},
    pages,
    parking::Parked,
    saga::{SagaEvent, SagaStatus},
};
use futures::TryStreamExt;
use serde_json::value::RawValue;

use super::{faults::Faults, histories::Histories};
use crate::{commands::import, failure::Failure};

/// The remedy for a checkpoint beyond the end of the log.
const REMEDY: &str = " (the database was restored to an earlier moment; the service returns to the end of the log at its \
     next start, or reset the subscription)";

/// Returns the number of documents.
pub(super) async fn verify(
    archive: &dyn Archive,
    histories: &Histories,
    faults: &mut Faults<'_>,
) -> Result<u64, Failure> {
    let mut count = 0;
    for collection in archive.collections().await? {
        let mut documents = pages::collection(archive, &collection, "");
        while let Some(document) = documents.try_next().await? {
            count += 1;
            if let Some(wrong) = wrong(archive, histories, &document).await? {
                faults.add(format!("document {}", document.key), wrong)?;
            }
        }
    }
    if let Some((_, import)) = import::progress_of(archive).await?.filter(|(_, import)| !import.contents.complete) {
        let events = import.contents.events;
        faults
            .add("import", format!("the import was interrupted after {events} events: import the same file again"))?;
    }
    Ok(count)
}

async fn wrong(archive: &dyn Archive, histories: &Histories, document: &Document) -> Result<Option<String>, Failure> {
    let unreadable = |error: serde_json::Error| Some(format!("the document cannot be read: {error}"));
    let collection = &*document.key.collection;
    if collection == CHECKPOINTS {
        return Ok(match serde_json::from_str::<Checkpoint>(&document.body) {
            Err(error) => unreadable(error),
            Ok(checkpoint) if checkpoint.next < 0 => Some(format!("the position {} is negative", checkpoint.next)),
            // Offsets in a topic are not positions in the log.
            Ok(checkpoint) if checkpoint.incarnation.is_some() => None,
            Ok(checkpoint) => {
                // The head was read after the checkpoint, so in a sound store it is not lower than the checkpoint.
                let head = archive.status().await?.head.0;
                match checkpoint.event {
                    _ if checkpoint.next > head => Some(format!(
                        "the checkpoint is at position {}, and the log ends at {head}{REMEDY}",
                        checkpoint.next
                    )),
                    Some(given) if !given.is_in(archive).await? => Some(format!(
                        "the checkpoint is after event {} at position {}, which is not in the log{REMEDY}",
                        given.id, given.position
                    )),
                    _ => None,
                }
            }
        });
    }
    if collection.starts_with("parked.") {
        let parked = match serde_json::from_str::<Parked>(&document.body) {
            Ok(parked) => parked,
            Err(error) => return Ok(unreadable(error)),
        };
        // A message that is parked for a lane of a topic has a position from another log.
        let of_log = parked.lane.matches('/').count() == 1;
        let head = archive.status().await?.head.0;
        return Ok((of_log && parked.position > head).then(|| {
            format!(
                "the parked event has position {}, and the log ends at {head}: drop the message, because its event is gone",
                parked.position
            )
        }));
    }
    if let Some(category) = collection.strip_prefix("snapshot.") {
        return snapshot(archive, category, document).await;
    }
    if !collection.starts_with("saga.") {
        return Ok(serde_json::from_str::<&RawValue>(&document.body).map_or_else(unreadable, |_| None));
    }
    let status = match serde_json::from_str::<SagaStatus>(&document.body) {
        Ok(status) => status,
        Err(error) => return Ok(unreadable(error)),
    };
    let stream = StreamId::from_stored(&format!("{collection}-{}", document.key.id));
    if status.ended_at.is_none() || histories.has_ended(stream.as_str()) == Some(true) {
        return Ok(None);
    }
    // The saga may have ended since its history was read.
    let events = pages::history(archive, &stream, Version::START);
    let last = events.try_fold(None, async |_, event| Ok(Some(event))).await?;
    let Some(last) = last else { return Ok(Some("the log has no such saga".into())) };
    let ended = last.decode::<SagaEvent>().ok().flatten().is_some_and(|event| event.progress().ended.is_some());
    Ok((!ended).then(|| "the document says that the saga has ended, and the log does not".into()))
}

/// The part of a snapshot that identifies its last event.
#[derive(serde::Deserialize)]
struct Snapshot {
    version: Version,
    ids: Vec<uuid::Uuid>,
}

/// Checks a snapshot. A snapshot of events that its stream lacks is not a fault: the engine ignores it and overwrites
/// it with the next snapshot.
async fn snapshot(archive: &dyn Archive, category: &str, document: &Document) -> Result<Option<String>, Failure> {
    let snapshot = match serde_json::from_str::<Snapshot>(&document.body) {
        Ok(snapshot) => snapshot,
        Err(error) => return Ok(Some(format!("the document cannot be read: {error}"))),
    };
    let Some(last) = snapshot.ids.last() else { return Ok(None) };
    let stream = StreamId::from_stored(&format!("{category}-{}", document.key.id));
    let found = archive.read_stream(&stream, Version(snapshot.version.0 - 1), 1).await?;
    let is_there = found.first().is_some_and(|event| event.version == snapshot.version && event.id == *last);
    Ok((!is_there).then(|| {
        format!(
            "the snapshot ends with event {last} at version {} of {stream}, which is not in the log (the snapshot is not used, \
             and the next snapshot replaces it)",
            snapshot.version
        )
    }))
}
