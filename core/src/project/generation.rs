//! The generations of a read model. A generation is one copy of all views. One generation is live. Others are being
//! built, or are waiting to be removed.
//!
//! A generation is first reserved by a build. The generation then becomes live, unless the build fails. Later the
//! generation is retired, and finally removed. Each of these steps is a compare-and-set of the pointer document. The
//! number of a generation is never reused. The commit that reserves a generation creates its checkpoint, and the commit
//! that retires the generation removes that checkpoint. Every commit that writes views checks the version of the
//! checkpoint, and no such commit creates a checkpoint. Therefore no process writes into a generation before the
//! generation is reserved or after it is retired. Only retired generations are removed, so a removal never touches live
//! views.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::backoff::Backoff,
    commit::{Append, Commit, CommitError, Document, DocumentKey, Put},
    event::Position,
    follow::{
        checkpoint::{CHECKPOINTS, Checkpoint, Lane},
        parking,
    },
    store::{
        EventStore, Scan, StoreError,
        pages::{self, PAGE},
    },
};

/// The collection that contains one pointer document per read model.
const GENERATIONS: &str = "read-model";
/// The maximum number of generations of a read model that are being built or removed at the same time, including builds
/// of dead processes. The number is limited because each generation holds another copy of all views.
const BUILDS_MAX: usize = 8;
/// How often a build sends a heartbeat.
pub(crate) const BEAT: Duration = Duration::from_secs(2);
/// After this time without a heartbeat, a build may be dead and is watched. The time equals five heartbeats, as for
/// instances.
const SILENT: Duration = Duration::from_secs(10);
/// How long a silent build is watched before its generation is retired. The time equals three heartbeats.
const WATCH: Duration = Duration::from_secs(6);
/// The maximum number of attempts to change the pointer, because heartbeats and other builds may change the pointer
/// first.
const RACES_MAX: u32 = 50;

/// The pointer document of a read model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pointer {
    /// The live generation.
    pub live: u32,
    /// The version of the code that built the live generation; `None` if an earlier release built it, or if there are
    /// no views yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// The lowest generation number that was never used.
    #[serde(default)]
    next: u32,
    /// The generations under construction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub builds: Vec<Build>,
    /// The generations that are no longer read, but that may still have views to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<u32>,
}

/// A generation that belongs to a build.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Build {
    pub generation: u32,
    /// The version of the code that builds the generation.
    pub version: u32,
    builder: Uuid,
    /// The time of the last heartbeat of the build.
    beat: DateTime<Utc>,
}

/// The puts and appends committed together with a change of the pointer.
#[derive(Default)]
pub(crate) struct With {
    pub puts: Vec<Put>,
    pub appends: Vec<Append>,
}

impl Default for Pointer {
    fn default() -> Self {
        Self { live: 1, version: None, next: 2, builds: Vec::new(), retired: Vec::new() }
    }
}

impl Build {
    /// Returns whether the last heartbeat of the build is recent. `now` is the time of the store's clock.
    pub fn is_alive(&self, now: DateTime<Utc>) -> bool {
        now - self.beat < chrono::Duration::from_std(SILENT).unwrap_or_default()
    }
}

impl Pointer {
    pub fn build_of(&self, builder: Uuid) -> Option<&Build> {
        self.builds.iter().find(|build| build.builder == builder)
    }

    /// Removes the reservation of a build, and retires its generation.
    pub fn end_build(&mut self, model: &str, builder: Uuid) -> Option<With> {
        let generation = self.build_of(builder)?.generation;
        self.builds.retain(|build| build.builder != builder);
        Some(self.retire(model, generation))
    }

    /// Retires a generation. No worker can write to a retired generation.
    fn retire(&mut self, model: &str, generation: u32) -> With {
        self.retired.push(generation);
        With { puts: vec![removal(checkpoint(model, generation))], appends: Vec::new() }
    }

    /// Makes the generation of a build live, and retires the previous one.
    pub fn swap(&mut self, model: &str, builder: Uuid) -> Option<With> {
        let Build { generation, version, .. } = self.build_of(builder)?.clone();
        self.builds.retain(|build| build.builder != builder);
        let before = std::mem::replace(&mut self.live, generation);
        self.version = Some(version);
        Some(self.retire(model, before))
    }
}

pub(crate) fn name(model: &str, generation: u32) -> String {
    format!("{model}@{generation}")
}

/// The key of a read model's pointer document.
pub(crate) fn pointer_key(model: &str) -> DocumentKey {
    DocumentKey::new(GENERATIONS, model)
}

/// The collection of a generation's views.
pub(crate) fn collection(model: &str, generation: u32) -> String {
    format!("read.{}", name(model, generation))
}

/// The key of a generation's checkpoint.
pub(crate) fn checkpoint(model: &str, generation: u32) -> DocumentKey {
    DocumentKey::new(CHECKPOINTS, format!("{}/0", name(model, generation)))
}

/// Returns the pointer and the version of the pointer document.
pub(crate) async fn load(store: &dyn EventStore, model: &str) -> Result<(Pointer, i64), StoreError> {
    let found = store.document(&pointer_key(model)).await?;
    let Some(Document { body, version, .. }) = found else { return Ok((Pointer::default(), 0)) };
    let mut pointer: Pointer =
        serde_json::from_str(&body).map_err(|error| StoreError::Corrupt(format!("read model {model}: {error}")))?;
    // Earlier releases did not store `next`.
    pointer.next = pointer.next.max(pointer.live + 1);
    Ok((pointer, version))
}

/// Changes the pointer by compare-and-set, and retries if another change was committed first. `decide` returns `None`
/// if there is nothing to change, for example because an earlier attempt with an unknown outcome turns out to be
/// committed.
pub(crate) async fn change<E: From<CommitError>>(
    store: &dyn EventStore,
    model: &str,
    mut decide: impl FnMut(&mut Pointer) -> Result<Option<With>, E>,
) -> Result<Pointer, E> {
    let mut backoff = Backoff::short();
    let mut unknown = None;
    for _ in 0..RACES_MAX {
        let loaded = load(store, model).await.map_err(unavailable);
        // If an earlier attempt may have been committed, the error must say that the outcome is unknown, not that the
        // change failed.
        let (mut pointer, version) = loaded.map_err(|error| unknown.clone().unwrap_or(error))?;
        let Some(With { mut puts, appends }) = decide(&mut pointer)? else { return Ok(pointer) };
        puts.push(pointer_at(model, &pointer, version));
        match store.commit(Commit { appends, puts }).await {
            Ok(_) => return Ok(pointer),
            Err(CommitError::DocumentConflict { .. }) => {}
            Err(error @ CommitError::Unknown(_)) => unknown = Some(error),
            Err(error) => return Err(unknown.unwrap_or(error).into()),
        }
        backoff.wait().await;
    }
    let reason = format!("the pointer of read model {model} changed {RACES_MAX} times during the attempt: try again");
    Err(unknown.unwrap_or(CommitError::Unavailable(reason)).into())
}

/// Prepares the live generation for code of this version. If no views exist yet, creates the checkpoint of the live
/// generation and the pointer.
pub(crate) async fn adopt(store: &dyn EventStore, model: &str, version: u32) -> Result<Pointer, CommitError> {
    loop {
        let (pointer, at) = load(store, model).await.map_err(unavailable)?;
        let live = checkpoint(model, pointer.live);
        let is_kept = store.document(&live).await.map_err(unavailable)?.is_some();
        if is_kept && pointer.version.is_some() {
            return Ok(pointer);
        }
        let views = store.scan(&collection(model, pointer.live), &Scan::After("".into()), 1).await;
        if !is_kept && !views.map_err(unavailable)?.is_empty() {
            return Err(CommitError::Invalid(format!(
                "read model {model} has lost its checkpoint {}: rebuild the views",
                live.id
            )));
        }
        // Views without a version were built by a release without versions, and count as version 1.
        let version = if is_kept { 1 } else { version };
        let pointer = Pointer { version: pointer.version.or(Some(version)), ..pointer };
        let mut puts = vec![pointer_at(model, &pointer, at)];
        puts.extend((!is_kept).then(|| created(store, live, Some(0))));
        match store.commit(Commit { appends: Vec::new(), puts }).await {
            // Another process, or a build, has committed first. The next round of the loop reads what that commit
            // wrote.
            Err(CommitError::DocumentConflict { .. }) => {}
            outcome => return outcome.map(|_| pointer),
        }
    }
}

/// Reserves a generation for a build, and creates the checkpoint of the generation at the start of the log.
pub(crate) async fn reserve(
    store: &dyn EventStore,
    model: &str,
    version: u32,
    builder: Uuid,
) -> Result<(Build, Pointer), CommitError> {
    let pointer = change(store, model, |pointer| {
        if pointer.build_of(builder).is_some() {
            return Ok(None);
        }
        if pointer.builds.len() + pointer.retired.len() >= BUILDS_MAX {
            return Err(CommitError::Unavailable(format!(
                "{} generations of read model {model} are being built or removed; the limit is {BUILDS_MAX}: wait \
                 until other builds end",
                pointer.builds.len() + pointer.retired.len()
            )));
        }
        let generation = pointer.next;
        pointer.next += 1;
        pointer.builds.push(Build { generation, version, builder, beat: store.clock().now() });
        // The new checkpoint fences any writer that an earlier release left behind with this generation number.
        Ok(Some(With { puts: vec![created(store, checkpoint(model, generation), None)], appends: Vec::new() }))
    })
    .await?;
    let build = pointer.build_of(builder).cloned();
    let build =
        build.ok_or_else(|| CommitError::Unavailable(format!("the build of read model {model} was retired")))?;
    remove(store, model, build.generation).await?;
    Ok((build, pointer))
}

/// Writes a heartbeat of a build. Returns `false` if another process considered the build dead and retired its
/// generation.
pub(crate) async fn beat(store: &dyn EventStore, model: &str, builder: Uuid) -> Result<bool, CommitError> {
    let beats = |pointer: &mut Pointer| {
        let build = pointer.builds.iter_mut().find(|build| build.builder == builder);
        Ok::<_, CommitError>(build.map(|build| {
            build.beat = store.clock().now();
            With::default()
        }))
    };
    Ok(change(store, model, beats).await?.build_of(builder).is_some())
}

/// Retires the generations of dead builds, and removes all retired generations.
pub(crate) async fn clean(store: &dyn EventStore, model: &str) -> Result<(), CommitError> {
    let (pointer, _) = load(store, model).await.map_err(unavailable)?;
    let now = store.clock().now();
    let silent: Vec<Build> = pointer.builds.into_iter().filter(|build| !build.is_alive(now)).collect();
    if !silent.is_empty() {
        tokio::time::sleep(WATCH).await;
        for dead in &silent {
            // A heartbeat changes the value of the build, so `contains` returns false for a build that has sent a
            // heartbeat in the meantime.
            let retires = |pointer: &mut Pointer| match pointer.builds.contains(dead) {
                true => Ok::<_, CommitError>(pointer.end_build(model, dead.builder)),
                false => Ok(None),
            };
            change(store, model, retires).await?;
        }
    }
    remove_retired(store, model).await
}

/// Removes the views and parked messages of all retired generations.
pub(crate) async fn remove_retired(store: &dyn EventStore, model: &str) -> Result<(), CommitError> {
    let (pointer, _) = load(store, model).await.map_err(unavailable)?;
    for generation in pointer.retired {
        remove(store, model, generation).await?;
        let forgets = |pointer: &mut Pointer| {
            let known = pointer.retired.contains(&generation);
            pointer.retired.retain(|retired| *retired != generation);
            Ok::<_, CommitError>(known.then(With::default))
        };
        change(store, model, forgets).await?;
    }
    Ok(())
}

/// Removes the views of a generation that no worker owns. Parked messages are removed first. As long as the document of
/// a parked message exists, a fenced worker may still retry the message, and the retry writes views.
async fn remove(store: &dyn EventStore, model: &str, generation: u32) -> Result<(), CommitError> {
    for collection in [&*parking::collection(&name(model, generation)), &*collection(model, generation)] {
        loop {
            let page = store.scan(collection, &Scan::After("".into()), PAGE).await.map_err(unavailable)?;
            if page.is_empty() {
                break;
            }
            let puts = page.into_iter().map(|document| removal(document.key)).collect();
            store.commit(Commit { appends: Vec::new(), puts }).await?;
        }
    }
    Ok(())
}

/// Returns the position of the checkpoint of a generation, or the start of the log if there is no checkpoint.
pub(crate) async fn reached(store: &dyn EventStore, model: &str, generation: u32) -> Result<Position, StoreError> {
    Ok(position(store.document(&checkpoint(model, generation)).await?.as_ref()))
}

/// Returns the position in a checkpoint document.
pub(crate) fn position(checkpoint: Option<&Document>) -> Position {
    let read = checkpoint.and_then(|document| serde_json::from_str::<Checkpoint>(&document.body).ok());
    Position(read.map_or(0, |checkpoint| checkpoint.next))
}

/// Counts the documents of a collection.
pub(crate) async fn count(store: &dyn EventStore, collection: &str) -> Result<usize, StoreError> {
    pages::collection(store, collection, "").try_fold(0, async |count, _| Ok(count + 1)).await
}

fn pointer_at(model: &str, pointer: &Pointer, version: i64) -> Put {
    let body = serde_json::to_string(pointer).unwrap_or_default();
    Put { key: pointer_key(model), expected: Some(version), body: Some(body.into()), due: None }
}

fn created(store: &dyn EventStore, checkpoint: DocumentKey, expected: Option<i64>) -> Put {
    let body = Lane::new(&checkpoint.id, None).body(store.clock().now());
    Put { key: checkpoint, expected, body: Some(body), due: None }
}

fn removal(key: DocumentKey) -> Put {
    Put { key, expected: None, body: None, due: None }
}

pub(crate) fn unavailable(error: StoreError) -> CommitError {
    CommitError::Unavailable(error.to_string())
}
