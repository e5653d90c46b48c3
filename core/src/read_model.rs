//! Views kept up to date from the log, rebuilt beside the old ones and swapped.

use std::{marker::PhantomData, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio_util::sync::CancellationToken;

use crate::{
    bus::Message,
    checkpoint::CHECKPOINTS,
    commit::{Commit, CommitError, Document, DocumentKey, Put},
    event::{Event, Position},
    handler::{Handler, HandlerError, Terminal},
    health::Health,
    instance::Instance,
    json::to_json_exact,
    store::{EventStore, LogQuery, Scan, StoreError},
    subscription::Subscription,
    work::Work,
};

pub use crate::rebuild::{Compared, Difference, Rebuild, Rebuilt};

/// How often a running projection looks whether it was swapped for a rebuilt one.
const SWAP_TICK: Duration = Duration::from_millis(500);
/// Documents read or removed in one go.
const PAGE: usize = 500;
/// The collection of the pointers that say which generation of a read model is the live one.
const GENERATIONS: &str = "read-model";

/// Folds events into views, one document per key. Pure, so that it can be rebuilt at any time.
pub trait ReadModel: Send + Sync + 'static {
    /// Stored: never rename.
    const NAME: &'static str;
    /// The events it wants; declare `#[event(unknown = "skip")]` to pass over the others of its query.
    type Event: Event;
    /// One document.
    type View: Default + Serialize + DeserializeOwned + Send;

    /// The keys of the views that an event changes.
    fn keys(&self, event: &Self::Event, message: &Message) -> Vec<String>;
    /// Changes one of them.
    fn apply(&self, key: &str, view: &mut Self::View, event: &Self::Event, message: &Message);
}

/// Keeps the views of a read model.
pub struct Projection<R> {
    model: Arc<R>,
    query: LogQuery,
    linger: Duration,
    instance: Option<Instance>,
}

impl<R> Clone for Projection<R> {
    fn clone(&self) -> Self {
        let (model, query, instance) = (self.model.clone(), self.query.clone(), self.instance.clone());
        Self { model, query, linger: self.linger, instance }
    }
}

#[derive(Serialize, Deserialize)]
struct Generation {
    live: u32,
}

impl<R: ReadModel> Projection<R> {
    /// A projection of the events that `query` gives.
    pub fn new(model: R, query: LogQuery) -> Self {
        Self { model: Arc::new(model), query, linger: Duration::ZERO, instance: None }
    }

    /// Lets the views be behind by about so long, under load four times that, which saves writes where the same ones change often;
    /// see [`Subscription::linger`].
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Takes turns with other instances at keeping the live views; see [`Subscription::shared`].
    pub(crate) fn shared(mut self, instance: Option<Instance>) -> Self {
        self.instance = instance;
        self
    }

    /// Keeps the live generation up to date until `shutdown`, and changes over when it is swapped.
    pub async fn run(
        self,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), String> {
        while !shutdown.is_cancelled() {
            let (generation, _) = live(&*store, R::NAME).await.map_err(|error| error.to_string())?;
            let swapped = shutdown.child_token();
            let subscription = self.subscription(generation).shared(self.instance.clone());
            let follows = subscription.run(store.clone(), health.clone(), swapped.clone());
            let watches = async {
                loop {
                    tokio::time::sleep(SWAP_TICK).await;
                    if live(&*store, R::NAME).await.is_ok_and(|(live, _)| live != generation) {
                        swapped.cancel();
                        return;
                    }
                }
            };
            tokio::pin!(follows);
            let was_swapped = tokio::select! {
                ended = &mut follows => ended.map(|()| false)?,
                () = watches => follows.await.map(|()| true)?,
            };
            if was_swapped {
                // Between the swap and this moment it may have put views back that the rebuild had removed.
                remove(&*store, R::NAME, generation).await.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// Builds all views anew beside the live ones, from the first event, and swaps them in once they have caught up. Whoever
    /// reads meanwhile reads the old ones. A rebuild that was cut off starts over.
    ///
    /// # Errors
    /// If the store is away, or another rebuild was faster.
    pub async fn rebuild(&self, store: Arc<dyn EventStore>) -> Result<Rebuilt, String> {
        self.build(store, |_| {}).await?.swap().await.map_err(|error| format!("{} was not swapped: {error}", R::NAME))
    }

    /// Builds all views anew beside the live ones, and returns once they have caught up: to be compared, and swapped or
    /// discarded. Meanwhile it tells which position of the log it has come to.
    ///
    /// # Errors
    /// If the store is away.
    pub async fn build(&self, store: Arc<dyn EventStore>, told: impl FnMut(Position)) -> Result<Rebuild, String> {
        let (before, version) = live(&*store, R::NAME).await.map_err(|error| error.to_string())?;
        let generation = before + 1;
        remove(&*store, R::NAME, generation).await.map_err(|error| error.to_string())?;
        let subscription = self.subscription(generation);
        Rebuild::follow(store, R::NAME, (before, version), subscription, told).await
    }

    fn subscription(&self, generation: u32) -> Subscription {
        let handler = Project { model: self.model.clone(), collection: collection(R::NAME, generation).into() };
        Subscription::new(&name(R::NAME, generation), handler).query(self.query.clone()).linger(self.linger)
    }
}

fn name(model: &str, generation: u32) -> String {
    format!("{model}@{generation}")
}

pub(crate) fn collection(model: &str, generation: u32) -> String {
    format!("read.{}", name(model, generation))
}

/// The document that says how far a generation has come.
pub(crate) fn checkpoint(model: &str, generation: u32) -> DocumentKey {
    DocumentKey::new(CHECKPOINTS, format!("{}/0", name(model, generation)))
}

/// The collection of the views that are live, by whatever build they are kept.
pub async fn live_collection(store: &dyn EventStore, model: &str) -> Result<String, StoreError> {
    Ok(collection(model, live(store, model).await?.0))
}

/// The live generation, and the version of the document that says so.
async fn live(store: &dyn EventStore, name: &str) -> Result<(u32, i64), StoreError> {
    let pointer = store.document(&DocumentKey::new(GENERATIONS, name)).await?;
    let Some(Document { body, version, .. }) = pointer else { return Ok((1, 0)) };
    let generation: Generation =
        serde_json::from_str(&body).map_err(|error| StoreError::Corrupt(format!("read model {name}: {error}")))?;
    Ok((generation.live, version))
}

/// Makes a generation the live one, if the pointer is still at this version.
pub(crate) fn pointer(model: &str, generation: u32, version: i64) -> Put {
    let body = serde_json::to_string(&Generation { live: generation }).unwrap_or_default();
    Put { key: DocumentKey::new(GENERATIONS, model), expected: Some(version), body: Some(body.into()), due: None }
}

/// Removes a generation's views and its checkpoint.
pub(crate) async fn remove(store: &dyn EventStore, model: &str, generation: u32) -> Result<usize, CommitError> {
    let (collection, mut removed) = (collection(model, generation), 0);
    let checkpoint = checkpoint(model, generation);
    let remove = |key: DocumentKey| Put { key, expected: None, body: None, due: None };
    let mut puts = vec![remove(checkpoint)];
    loop {
        let page = store.scan(&collection, &Scan::After("".into()), PAGE).await;
        let page = page.map_err(|error| CommitError::Unavailable(error.to_string()))?;
        removed += page.len();
        let last = page.is_empty();
        puts.extend(page.into_iter().map(|document| remove(document.key)));
        store.commit(Commit { appends: Vec::new(), puts: std::mem::take(&mut puts) }).await?;
        if last {
            return Ok(removed);
        }
    }
}

struct Project<R> {
    model: Arc<R>,
    collection: Arc<str>,
}

#[async_trait]
impl<R: ReadModel> Handler for Project<R> {
    async fn prepare(&self, messages: &[&Message], work: &mut Work) -> Result<(), HandlerError> {
        let decoded = messages.iter().filter_map(|message| Some((message, message.decode::<R::Event>().ok()??)));
        let keys: Vec<DocumentKey> = decoded
            .flat_map(|(message, event)| self.model.keys(&event, message))
            .map(|key| DocumentKey::new(self.collection.clone(), key))
            .collect();
        Ok(work.prefetch(&keys).await?)
    }

    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(event) = message.decode::<R::Event>()? else { return Ok(()) };
        for id in self.model.keys(&event, message) {
            let key = DocumentKey::new(self.collection.clone(), id.as_str());
            let mut view: R::View = work.document(&key).await?.unwrap_or_default();
            self.model.apply(&id, &mut view, &event, message);
            // The same event gives the same view again, so another try is of no use.
            let body = to_json_exact(&view).map_err(|error| format!("view {key}: {error}")).terminal()?;
            work.put_json(&key, Some(body.into()), None);
        }
        Ok(())
    }
}

/// Reads the live views of a read model.
pub struct Views<R> {
    store: Arc<dyn EventStore>,
    model: PhantomData<fn() -> R>,
}

impl<R: ReadModel> Views<R> {
    /// Of this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store, model: PhantomData }
    }

    /// One view.
    pub async fn get(&self, key: &str) -> Result<Option<R::View>, StoreError> {
        loop {
            let (generation, _) = live(&*self.store, R::NAME).await?;
            let key = DocumentKey::new(collection(R::NAME, generation), key);
            match self.store.document(&key).await? {
                Some(document) => return view::<R>(&document).map(Some),
                // It may have been removed because the generation was swapped meanwhile.
                None if live(&*self.store, R::NAME).await?.0 == generation => return Ok(None),
                None => {}
            }
        }
    }

    /// Views in order of their keys, after this one, up to `limit`.
    pub async fn list(&self, after: &str, limit: usize) -> Result<Vec<(Arc<str>, R::View)>, StoreError> {
        let (generation, _) = live(&*self.store, R::NAME).await?;
        let page = self.store.scan(&collection(R::NAME, generation), &Scan::After(after.into()), limit).await?;
        page.iter().map(|document| Ok((document.key.id.clone(), view::<R>(document)?))).collect()
    }
}

fn view<R: ReadModel>(document: &Document) -> Result<R::View, StoreError> {
    serde_json::from_str(&document.body).map_err(|error| StoreError::Corrupt(format!("{}: {error}", document.key)))
}
