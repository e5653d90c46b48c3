//! Views built anew beside the live ones, until they take their place or are given up.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    checkpoint::Checkpoint,
    commit::{Append, Commit, CommitError, Document},
    event::Position,
    health::Health,
    read_model::{checkpoint, collection, pointer, remove},
    store::{EventStore, Scan, StoreError},
    subscription::Subscription,
};

/// Documents read in one go.
const PAGE: usize = 500;
/// How often it is looked how far it has come.
const LOOK: Duration = Duration::from_millis(20);
/// So often a comparison looks again, because one side was ahead of the other.
const LOOKS_MAX: u32 = 250;

/// Views of a read model that are kept up to date beside the live ones. Dropped, they stay where they are until the next
/// rebuild removes them.
pub struct Rebuild {
    store: Arc<dyn EventStore>,
    model: &'static str,
    /// The generation that is live, and the version of the document that says so.
    live: (u32, i64),
    follows: JoinHandle<Result<(), String>>,
    done: DropGuard,
}

/// What a rebuild came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The generation that is live now.
    pub generation: u32,
    /// How many views it has.
    pub views: usize,
    /// How many the one before it had.
    pub views_before: usize,
}

/// Views side by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// How many are live.
    pub live: usize,
    /// How many were rebuilt.
    pub rebuilt: usize,
    /// How many are not the same, or are on one side only.
    pub differences: usize,
    /// How many of these nobody could look at with both sides at one position: one was behind the other all the time.
    pub uncertain: usize,
}

/// A view that is not the same on both sides. Each is JSON text.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Its key.
    pub key: Arc<str>,
    /// The live one, if there is one.
    pub live: Option<Arc<str>>,
    /// The one that was rebuilt, if there is one.
    pub rebuilt: Option<Arc<str>>,
}

impl Rebuild {
    pub(crate) async fn follow(
        store: Arc<dyn EventStore>,
        model: &'static str,
        live: (u32, i64),
        subscription: Subscription,
        mut told: impl FnMut(Position),
    ) -> Result<Self, String> {
        let done = CancellationToken::new();
        let follows = tokio::spawn(subscription.run(store.clone(), Health::default(), done.clone()));
        let this = Self { store, model, live, follows, done: done.drop_guard() };
        let head = this.store.status().await.map_err(|error| error.to_string())?.head;
        while head > Position::START && !this.follows.is_finished() {
            let reached = this.reached(this.generation()).await.map_err(|error| error.to_string())?;
            told(reached);
            if reached >= head {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(this)
    }

    fn generation(&self) -> u32 {
        self.live.0 + 1
    }

    /// What a subscription's checkpoint says; the start if there is none yet.
    async fn reached(&self, generation: u32) -> Result<Position, StoreError> {
        let found = self.store.document(&checkpoint(self.model, generation)).await?;
        Ok(position(found.as_ref()))
    }

    /// Compares the views on both sides, and tells of each that is not the same. While both are kept up to date, a view counts
    /// as different if it is so with both sides at the same position.
    pub async fn compare(&self, mut told: impl FnMut(Difference)) -> Result<Compared, StoreError> {
        let (mut compared, mut looks) = (Compared::default(), 0);
        let (mut live, mut rebuilt) = (Views::new(self, self.live.0), Views::new(self, self.generation()));
        loop {
            let (left, right) = (live.peek().await?, rebuilt.peek().await?);
            let (left, right) = match (left, right) {
                (None, None) => return Ok(compared),
                (Some(left), Some(right)) if left.key.id == right.key.id => (Some(left), Some(right)),
                (Some(left), Some(right)) if left.key.id > right.key.id => (None, Some(right)),
                (None, right) => (None, right),
                (left, _) => (left, None),
            };
            let Some(key) = left.as_ref().or(right.as_ref()).map(|view| view.key.id.clone()) else { continue };
            if left.is_some() {
                (live.at, compared.live) = (live.at + 1, compared.live + 1);
            }
            if right.is_some() {
                (rebuilt.at, compared.rebuilt) = (rebuilt.at + 1, compared.rebuilt + 1);
            }
            if same(left.as_ref(), right.as_ref()) {
                continue;
            }
            if let Some((difference, certain)) = self.look_again(key, &mut looks).await? {
                compared.differences += 1;
                compared.uncertain += usize::from(!certain);
                told(difference);
            }
        }
    }

    /// Both sides of a view as of one moment; whether that was also one position. `None` if they are the same.
    async fn look_again(&self, key: Arc<str>, looks: &mut u32) -> Result<Option<(Difference, bool)>, StoreError> {
        let generations = [self.live.0, self.generation()];
        let views = generations.map(|generation| (collection(self.model, generation), key.clone()));
        let [live, rebuilt] = views.map(|(collection, id)| crate::commit::DocumentKey::new(collection, id));
        let [of_live, of_rebuilt] = generations.map(|generation| checkpoint(self.model, generation));
        let keys = [live, rebuilt, of_live, of_rebuilt];
        loop {
            let mut found = self.store.documents(&keys).await?.into_iter();
            let mut next = || found.next().flatten();
            let (live, rebuilt, of_live, of_rebuilt) = (next(), next(), next(), next());
            if same(live.as_ref(), rebuilt.as_ref()) {
                return Ok(None);
            }
            // Views that nobody has ever kept are behind nothing.
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

    /// Takes the place of the live views, which are removed.
    ///
    /// # Errors
    /// If the store did not take it, or another rebuild was faster.
    pub async fn swap(self) -> Result<Rebuilt, CommitError> {
        self.swap_with(Vec::new()).await
    }

    /// The same, in one commit with these events.
    pub(crate) async fn swap_with(self, appends: Vec<Append>) -> Result<Rebuilt, CommitError> {
        let (generation, (before, version)) = (self.generation(), self.live);
        let Self { store, model, follows, done, .. } = self;
        end(follows, done).await?;
        let swap = Commit { appends, puts: vec![pointer(model, generation, version)] };
        store.commit(swap).await?;
        let views = count(&*store, &collection(model, generation)).await;
        let views = views.map_err(|error| CommitError::Unavailable(error.to_string()))?;
        let views_before = remove(&*store, model, before).await?;
        Ok(Rebuilt { generation, views, views_before })
    }

    /// Removes what was built.
    ///
    /// # Errors
    /// If the store is away; then the next rebuild removes it.
    pub async fn discard(self) -> Result<(), CommitError> {
        let generation = self.generation();
        let Self { store, model, follows, done, .. } = self;
        end(follows, done).await?;
        remove(&*store, model, generation).await.map(drop)
    }

    /// Of which read model.
    pub fn model(&self) -> &'static str {
        self.model
    }
}

/// Until it has handled what is recorded by now.
async fn end(follows: JoinHandle<Result<(), String>>, done: DropGuard) -> Result<(), CommitError> {
    drop(done);
    let ended = follows.await.unwrap_or_else(|panic| Err(panic.to_string()));
    ended.map_err(CommitError::Unavailable)
}

fn position(checkpoint: Option<&Document>) -> Position {
    let read = checkpoint.and_then(|document| serde_json::from_str::<Checkpoint>(&document.body).ok());
    Position(read.map_or(0, |checkpoint| checkpoint.next))
}

/// The same value: a map in a view has its members in any order.
fn same(left: Option<&Document>, right: Option<&Document>) -> bool {
    let read = |view: &Document| serde_json::from_str::<serde_json::Value>(&view.body).ok();
    match (left, right) {
        (Some(left), Some(right)) => {
            left.body == right.body || read(left).is_some_and(|left| Some(left) == read(right))
        }
        _ => left.is_none() && right.is_none(),
    }
}

/// The views of a generation, page by page.
struct Views<'a> {
    rebuild: &'a Rebuild,
    collection: String,
    page: Vec<Document>,
    at: usize,
    /// Where the next page begins; `None` after the last.
    after: Option<Arc<str>>,
}

impl<'a> Views<'a> {
    fn new(rebuild: &'a Rebuild, generation: u32) -> Self {
        let collection = collection(rebuild.model, generation);
        Self { rebuild, collection, page: Vec::new(), at: 0, after: Some("".into()) }
    }

    async fn peek(&mut self) -> Result<Option<Document>, StoreError> {
        if self.at == self.page.len()
            && let Some(after) = self.after.take()
        {
            (self.page, self.at) = (self.rebuild.store.scan(&self.collection, &Scan::After(after), PAGE).await?, 0);
            self.after = self.page.last().map(|last| last.key.id.clone());
        }
        Ok(self.page.get(self.at).cloned())
    }
}

async fn count(store: &dyn EventStore, collection: &str) -> Result<usize, StoreError> {
    let (mut count, mut after) = (0, Arc::<str>::from(""));
    loop {
        let page = store.scan(collection, &Scan::After(after), PAGE).await?;
        let Some(last) = page.last() else { return Ok(count) };
        (count, after) = (count + page.len(), last.key.id.clone());
    }
}
