//! Rebuilds views. The new views are built next to the live views, and then replace the live views or are discarded.

use std::{cmp::Ordering, sync::Arc, time::Duration};

use futures::TryStreamExt;
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::{
    base::name::NameError,
    commit::{Append, CommitError, Document, Put},
    event::Position,
    follow::{
        checkpoint::Checkpoint,
        parking::{self, Parked},
        subscription::Subscription,
    },
    health::Health,
    project::generation::{self, BEAT, Build, checkpoint, collection, count, position, unavailable},
    store::{EventStore, Scan, StoreError, pages},
};

/// How often the progress of a build is checked.
const LOOK: Duration = Duration::from_millis(20);
/// The maximum number of times that one comparison reads views again because one side was ahead of the other.
const LOOKS_MAX: u32 = 250;
/// The maximum number of events that a build may fail to apply. With more failures, the code of the read model is
/// probably faulty, and the build is given up.
const PARKED_MAX: usize = 1_000;
/// How often the failed events of a build are counted.
const COUNT_AGAIN: Duration = Duration::from_secs(1);
/// How long a build waits for an unavailable store. This is long enough for a restart of the database server, or for a
/// failover.
const OUTAGE_MAX: Duration = Duration::from_secs(60);

/// The rebuilt views of a read model. The rebuilt views have a generation of their own, and stay up to date while the
/// live views still serve readers. If the `Rebuild` is dropped or its process dies, a later build removes the abandoned
/// generation.
pub struct Rebuild {
    store: Arc<dyn EventStore>,
    model: &'static str,
    build: Build,
    builder: Uuid,
    /// The live generation at the start of the build.
    before: u32,
    accepts_parked: bool,
    accepts_older: bool,
    follows: JoinHandle<()>,
    done: Option<DropGuard>,
}

debug_fields!(Rebuild { model, build, before });

/// Why rebuilt views did not replace the live views. The live views stay as they were.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// Events could not be applied, so the new views would be incomplete. The built views are removed.
    #[error(
        "{parked} events could not be applied to the new views of read model {model} (the first: {first}): fix the \
         code and build again, or swap with `accept_parked` (`--accept-parked`), after which the events wait as \
         dead letters"
    )]
    Parked {
        /// The name of the read model.
        model: &'static str,
        /// How many events failed. The count stops at a limit.
        parked: usize,
        /// The key and the reason of the first failed event.
        first: String,
    },
    /// Another build was swapped in after this build started. The built views are removed.
    #[error("another build of read model {model} finished first: generation {live} is live now; build again")]
    Outrun {
        /// The name of the read model.
        model: &'static str,
        /// The live generation.
        live: u32,
    },
    /// The live views belong to a later version of the code. The built views are removed.
    #[error(
        "the live views of read model {model} are of version {live}, and this build has version {version}; to go \
         back to version {version}, swap with `accept_older` (`--accept-older`)"
    )]
    Older {
        /// The name of the read model.
        model: &'static str,
        /// The version of the live views.
        live: u32,
        /// The version of this build.
        version: u32,
    },
    /// Another build considered this build dead, because this build had sent no heartbeat for too long.
    #[error(
        "another process gave up the build of read model {model}, because this process stalled for too long; build \
         again"
    )]
    GivenUp {
        /// The name of the read model.
        model: &'static str,
    },
    /// The store refused the commit, or the outcome of the commit is unknown.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// Why the views of a read model were not rebuilt. The live views stay as they were.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RebuildError {
    /// The name of the read model is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The new views were not built.
    #[error("read model {model} was not built: {source}")]
    NotBuilt {
        /// The name of the read model.
        model: &'static str,
        /// The reason.
        source: SwapError,
    },
    /// The new views were built, and did not replace the live views.
    #[error("the new views of read model {model} were not swapped in: {source}")]
    NotSwapped {
        /// The name of the read model.
        model: &'static str,
        /// The reason.
        source: SwapError,
    },
}

/// The result of a rebuild.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The generation that is live now.
    pub generation: u32,
    /// How many views the new generation has.
    pub views: usize,
    /// How many views the previous generation had.
    pub views_before: usize,
    /// How many events are parked because they could not be applied to the new views.
    pub parked: usize,
}

/// The result of comparing live and rebuilt views.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// How many views are live.
    pub live: usize,
    /// How many views were rebuilt.
    pub rebuilt: usize,
    /// How many views differ, or exist on one side only.
    pub differences: usize,
    /// How many of these differences are uncertain. For an uncertain difference, the comparison never saw both sides at
    /// the same position, because one side was always behind the other.
    pub uncertain: usize,
    /// How many events could not be applied to the rebuilt views.
    pub parked: usize,
}

/// A view that differs between the live and the rebuilt views. Both values are JSON text.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The key of the view.
    pub key: Arc<str>,
    /// The live view, if there is one.
    pub live: Option<Arc<str>>,
    /// The rebuilt view, if there is one.
    pub rebuilt: Option<Arc<str>>,
}

impl Rebuild {
    /// Reserves a generation and starts to fill it with views.
    pub(crate) async fn begin(
        store: Arc<dyn EventStore>,
        model: &'static str,
        version: u32,
        subscription: impl FnOnce(u32) -> Subscription,
    ) -> Result<Self, CommitError> {
        generation::clean(&*store, model).await?;
        let builder = Uuid::new_v4();
        let (build, pointer) = generation::reserve(&*store, model, version, builder).await?;
        let done = CancellationToken::new();
        let follows = subscription(build.generation).run(store.clone(), Health::default(), done.clone());
        let beats = beats(store.clone(), model, builder);
        let follows = tokio::spawn(async move {
            tokio::select! {
                _ = follows => {}
                () = beats => {}
            }
        });
        let accepts_parked = false;
        let accepts_older = false;
        let before = pointer.live;
        let done = Some(done.drop_guard());
        Ok(Self { store, model, build, builder, before, accepts_parked, accepts_older, follows, done })
    }

    /// Returns once the build has handled all events that were recorded before the call. Until then, calls
    /// `on_progress` with each position of the log that the build reaches.
    ///
    /// # Errors
    /// Fails if the store is unavailable for a minute, if another process has ended the build because of missing
    /// heartbeats, or if more events fail than a build may park.
    pub async fn catch_up(&self, mut on_progress: impl FnMut(Position)) -> Result<(), SwapError> {
        let mut answered_at = Instant::now();
        let mut counted_at = Instant::now();
        let mut head = None;
        loop {
            if self.follows.is_finished() {
                return Err(SwapError::GivenUp { model: self.model });
            }
            match self.progress(&mut head, &mut counted_at).await {
                Ok((reached, head)) => {
                    answered_at = Instant::now();
                    on_progress(reached);
                    if reached >= head {
                        return Ok(());
                    }
                }
                Err(SwapError::Commit(CommitError::Unavailable(_))) if answered_at.elapsed() < OUTAGE_MAX => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Returns the position that the build has reached, and the position that it must reach.
    async fn progress(
        &self,
        head: &mut Option<Position>,
        counted_at: &mut Instant,
    ) -> Result<(Position, Position), SwapError> {
        let until = match *head {
            Some(head) => head,
            None => *head.insert(self.store.status().await.map_err(unavailable)?.head),
        };
        if counted_at.elapsed() > COUNT_AGAIN {
            *counted_at = Instant::now();
            let (parked, first) = self.parked().await?;
            if parked >= PARKED_MAX {
                return Err(SwapError::Parked { model: self.model, parked, first });
            }
        }
        let reached =
            generation::reached(&*self.store, self.model, self.build.generation).await.map_err(unavailable)?;
        Ok((reached, until))
    }

    /// Allows the swap even if events could not be applied. These events stay parked as dead letters, and the views
    /// that they change are incomplete until the events are handled.
    pub fn accept_parked(mut self) -> Self {
        self.accepts_parked = true;
        self
    }

    /// Allows the swap even if the live views belong to a later version of the code. Use this to go back to an earlier
    /// version.
    pub fn accept_older(mut self) -> Self {
        self.accepts_older = true;
        self
    }

    /// Returns how many messages are parked, up to a limit, and a description of the first of them.
    async fn parked(&self) -> Result<(usize, String), CommitError> {
        let of = parking::collection(&generation::name(self.model, self.build.generation));
        let found = self.store.scan(&of, &Scan::After("".into()), PARKED_MAX).await.map_err(unavailable)?;
        let failed = found.iter().filter_map(|document| serde_json::from_str::<Parked>(&document.body).ok());
        let first = failed.into_iter().find(|parked| parked.attempts > 0);
        let first = first.map(|parked| format!("key {}: {:.200}", parked.key, parked.reason)).unwrap_or_default();
        Ok((found.len(), first))
    }

    /// Compares the live views with the rebuilt views, and calls `on_difference` for each view that differs. Both sides
    /// may still be changing. A view whose values differ is therefore read again until both sides are at the same
    /// position. If they are not at the same position after several reads, the difference is reported and counted as
    /// uncertain.
    ///
    /// # Errors
    /// Fails if the store cannot be read, or if other views are swapped in during the comparison.
    pub async fn compare(&self, on_difference: impl FnMut(Difference)) -> Result<Compared, StoreError> {
        let live = generation::load(&*self.store, self.model).await?.0.live;
        let mut compared = self.compare_with(live, on_difference).await?;
        if generation::load(&*self.store, self.model).await?.0.live != live {
            let reason = format!(
                "other views of read model {} were swapped in during the comparison: compare again",
                self.model
            );
            return Err(StoreError::Unavailable(reason));
        }
        let parked = self.parked().await.map_err(|error| StoreError::Unavailable(error.to_string()))?;
        compared.parked = parked.0;
        Ok(compared)
    }

    async fn compare_with(
        &self,
        of_live: u32,
        mut on_difference: impl FnMut(Difference),
    ) -> Result<Compared, StoreError> {
        let mut compared = Compared::default();
        let mut looks = 0;
        let names = [of_live, self.build.generation].map(|generation| collection(self.model, generation));
        let [mut live, mut rebuilt] = names.each_ref().map(|name| pages::collection(&*self.store, name, ""));
        let mut next_live = live.try_next().await?;
        let mut next_rebuilt = rebuilt.try_next().await?;
        loop {
            let order = match (&next_live, &next_rebuilt) {
                (None, None) => return Ok(compared),
                (Some(live), Some(rebuilt)) => live.key.id.cmp(&rebuilt.key.id),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
            };
            let left = next_live.take_if(|_| order.is_le());
            let right = next_rebuilt.take_if(|_| order.is_ge());
            if left.is_some() {
                compared.live += 1;
                next_live = live.try_next().await?;
            }
            if right.is_some() {
                compared.rebuilt += 1;
                next_rebuilt = rebuilt.try_next().await?;
            }
            if same(left.as_ref(), right.as_ref()) {
                continue;
            }
            let Some(key) = left.or(right).map(|view| view.key.id) else { continue };
            if let Some((difference, certain)) = self.look_again(of_live, key, &mut looks).await? {
                compared.differences += 1;
                compared.uncertain += usize::from(!certain);
                on_difference(difference);
            }
        }
    }

    /// Reads both values of a view from one snapshot of the store. Returns the difference, and whether both sides were
    /// at the same position; `None` if the values are equal.
    async fn look_again(
        &self,
        of_live: u32,
        key: Arc<str>,
        looks: &mut u32,
    ) -> Result<Option<(Difference, bool)>, StoreError> {
        let generations = [of_live, self.build.generation];
        let views = generations.map(|generation| (collection(self.model, generation), key.clone()));
        let [live, rebuilt] = views.map(|(collection, id)| crate::commit::DocumentKey::new(collection, id));
        let [of_live, of_rebuilt] = generations.map(|generation| checkpoint(self.model, generation));
        let keys = [live, rebuilt, of_live, of_rebuilt];
        loop {
            let mut found = self.store.documents(&keys).await?.into_iter();
            let mut next = || found.next().flatten();
            let live = next();
            let rebuilt = next();
            let of_live = next();
            let of_rebuilt = next();
            if same(live.as_ref(), rebuilt.as_ref()) {
                return Ok(None);
            }
            // Live views without a checkpoint were never maintained, so there is no position to compare.
            let certain = of_live.is_none() || position(of_live.as_ref()) == position(of_rebuilt.as_ref());
            if certain || *looks == LOOKS_MAX {
                let body = |view: Option<Document>| view.map(|view| view.body);
                let difference = Difference { key, live: body(live), rebuilt: body(rebuilt) };
                return Ok(Some((difference, certain)));
            }
            *looks += 1;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Replaces the live views with the rebuilt views, and removes the old ones.
    ///
    /// # Errors
    /// Fails if the views must not be swapped in (see [`SwapError`]), or if the store refused the commit. In these
    /// cases, the live views stay as they were, and the rebuilt views are removed. If the store is unavailable, the
    /// next build removes them.
    pub async fn swap(self) -> Result<Rebuilt, SwapError> {
        self.swap_with(Vec::new()).await
    }

    /// Like [`swap`](Self::swap), but also appends these events in the same commit.
    pub(crate) async fn swap_with(mut self, appends: Vec<Append>) -> Result<Rebuilt, SwapError> {
        // Counting may take a while, so the views are counted while the build still runs and sends heartbeats.
        let before = count(&*self.store, &collection(self.model, self.before)).await;
        self.end().await;
        let swapped = match before {
            Ok(views_before) => self.try_swap(appends, views_before).await,
            Err(error) => Err(unavailable(error).into()),
        };
        match &swapped {
            Ok(_) => {
                // The swap stays committed even if the removal fails. The next build or the next start of a service
                // then removes what is left.
                if let Err(error) = generation::remove_retired(&*self.store, self.model).await {
                    tracing::warn!(read_model = self.model, %error, "some replaced views are not removed yet");
                }
            }
            Err(_) => _ = self.remove().await,
        }
        swapped
    }

    async fn try_swap(&self, appends: Vec<Append>, views_before: usize) -> Result<Rebuilt, SwapError> {
        let model = self.model;
        let generation = self.build.generation;
        let version = self.build.version;
        let (parked, first) = self.parked().await?;
        if parked > 0 && !self.accepts_parked {
            return Err(SwapError::Parked { model, parked, first });
        }
        let paused = self.paused().await.map_err(unavailable)?;
        generation::change(&*self.store, model, |pointer| {
            if pointer.live == generation {
                return Ok(None);
            }
            if pointer.live != self.before {
                return Err(SwapError::Outrun { model, live: pointer.live });
            }
            if let Some(live) = pointer.version.filter(|live| *live > version && !self.accepts_older) {
                return Err(SwapError::Older { model, live, version });
            }
            let mut with = pointer.swap(model, self.builder).ok_or(SwapError::GivenUp { model })?;
            with.appends.clone_from(&appends);
            with.puts.extend(paused.clone());
            Ok(Some(with))
        })
        .await?;
        let views = count(&*self.store, &collection(model, generation)).await.map_err(unavailable);
        Ok(Rebuilt { generation, views: views.unwrap_or_default(), views_before, parked })
    }

    /// Returns the put that pauses the rebuilt views, if an operator has paused the live views.
    async fn paused(&self) -> Result<Option<Put>, StoreError> {
        let [live, rebuilt] = [self.before, self.build.generation].map(|number| checkpoint(self.model, number));
        let found = self.store.documents(&[live, rebuilt]).await?;
        let read = |document: &Document| serde_json::from_str::<Checkpoint>(&document.body).ok();
        let [Some(live), Some(rebuilt)] = &*found else { return Ok(None) };
        let (Some(live), Some(next)) = (read(live), read(rebuilt)) else { return Ok(None) };
        let body = serde_json::to_string(&Checkpoint { paused: true, ..next }).unwrap_or_default();
        let key = rebuilt.key.clone();
        let expected = Some(rebuilt.version);
        Ok(live.paused.then(|| Put { key, expected, body: Some(body.into()), due: None }))
    }

    /// Removes the built views.
    ///
    /// # Errors
    /// Fails if the store is unavailable. The next build then removes the views.
    pub async fn discard(mut self) -> Result<(), CommitError> {
        self.end().await;
        self.remove().await
    }

    /// The name of the read model.
    pub fn model(&self) -> &'static str {
        self.model
    }

    /// Lets the build handle the events that are in the log now, and then ends the build. At whatever position the
    /// build ends, the views and the checkpoint agree.
    async fn end(&mut self) {
        drop(self.done.take());
        _ = (&mut self.follows).await;
    }

    async fn remove(&self) -> Result<(), CommitError> {
        generation::change(&*self.store, self.model, |pointer| {
            Ok::<_, CommitError>(pointer.end_build(self.model, self.builder))
        })
        .await?;
        generation::remove_retired(&*self.store, self.model).await
    }
}

/// Sends heartbeats for a build, until another process has ended the build.
async fn beats(store: Arc<dyn EventStore>, model: &'static str, builder: Uuid) {
    loop {
        tokio::time::sleep(BEAT).await;
        match generation::beat(&*store, model, builder).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => tracing::warn!(read_model = model, %error, "the heartbeat of the build could not be written"),
        }
    }
}

/// Returns whether two views have the same value. The order of the entries of a map in a view does not matter.
fn same(left: Option<&Document>, right: Option<&Document>) -> bool {
    let read = |view: &Document| serde_json::from_str::<serde_json::Value>(&view.body).ok();
    match (left, right) {
        (Some(left), Some(right)) => {
            left.body == right.body || read(left).is_some_and(|left| Some(left) == read(right))
        }
        _ => left.is_none() && right.is_none(),
    }
}
