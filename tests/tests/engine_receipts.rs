//! The relay's checkpoint never passes a message that the bus has not accepted, no matter how many messages are in
//! flight.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::{
    BusError, DocumentKey, EventStore, Health, MemoryStore, Publisher,
    bus::{Outgoing, Receipt},
    checkpoint::{CHECKPOINTS, Checkpoint},
    relay::{Relay, Routes},
};
use annals_conformance::bus::within;
use annals_tests::tally::{add, document, eventually};
use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

type Taken = oneshot::Sender<Result<(), BusError>>;

/// A bus that accepts a message only when the test says so.
struct Slow(mpsc::UnboundedSender<(String, Taken)>);

#[async_trait]
impl Publisher for Slow {
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        let (taken, receipt) = oneshot::channel();
        let subjects: Vec<&str> = messages.iter().map(|outgoing| &*outgoing.message.subject).collect();
        self.0.send((subjects.join(" "), taken)).unwrap();
        Ok(Box::pin(async move { receipt.await.unwrap_or_else(|_| Err(BusError::Unavailable("gone".into()))) }))
    }
}

async fn checkpoint(store: &Arc<dyn EventStore>) -> Option<i64> {
    let body = document(store, &DocumentKey::new(CHECKPOINTS, "source.relay/0")).await?;
    Some(serde_json::from_str::<Checkpoint>(&body).unwrap().next)
}

#[tokio::test]
async fn receipt_does_not_cover_later_messages() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (published, mut arriving) = mpsc::unbounded_channel();
    let mut next = async || within("the message is published", arriving.recv()).await.unwrap();
    let shutdown = CancellationToken::new();
    let mut routes = Routes::of("source");
    routes.publish("tally");
    let relay = Relay::new(routes).run(store.clone(), Arc::new(Slow(published)), Health::default(), shutdown.clone());
    let relay = tokio::spawn(relay);

    // Three messages are in flight at once, each with its own receipt.
    let mut under_way = Vec::new();
    for id in ["a", "b", "c"] {
        add(&store, id, [1]).await;
        let (subject, taken) = next().await;
        assert_eq!(subject, format!("tally-{id}"));
        under_way.push(taken);
    }
    let [a, b, c] = under_way.try_into().unwrap();
    a.send(Ok(())).unwrap();
    eventually("the checkpoint is behind a", async || (checkpoint(&store).await == Some(1)).then_some(())).await;
    assert!(!b.is_closed() && !c.is_closed(), "the relay waits for the others no more");
    // A message that the bus did not accept is sent again, together with all messages after it.
    c.send(Ok(())).unwrap();
    b.send(Err(BusError::Unavailable("the message was lost".into()))).unwrap();
    let (subject, taken) = next().await;
    assert_eq!((subject.as_str(), checkpoint(&store).await), ("tally-b tally-c", Some(1)));
    taken.send(Ok(())).unwrap();
    eventually("the checkpoint is behind c", async || (checkpoint(&store).await == Some(3)).then_some(())).await;
    shutdown.cancel();
    within("stop", relay).await.unwrap().unwrap();
}
