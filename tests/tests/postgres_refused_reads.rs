//! A query that the store refuses is the fault of one message. The refusal does not mean that the store is away.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{
    Append, Commit, DeadLetters, DocumentKey, EventStore, Expected, Handler, HandlerError, LocalBus, Message, Metadata,
    NewEvent, Runtime, Scan, Service, StoreError, StreamId, Subscription, Work,
};
use annals_postgres::PostgresStore;
use annals_tests::tally::eventually;
use async_trait::async_trait;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use uuid::Uuid;

use self::postgres::{on_each_store, url};

/// For one of the messages, reads a document with this id.
struct Ask(&'static str);

#[async_trait]
impl Handler for Ask {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let id = if &*message.type_name == "p.poison" { self.0.to_owned() } else { message.subject.to_string() };
        let seen: Option<u64> = work.document(&DocumentKey::new("seen", id)).await?;
        work.put(&DocumentKey::new("seen", message.id.to_string()), &seen.unwrap_or(1))?;
        Ok(())
    }
}

const MESSAGES: usize = 10;

/// Appends ten messages, one of which triggers the bad query, and starts the subscription.
async fn ask(store: &Arc<dyn EventStore>, id: &'static str) -> Runtime {
    for number in 0..MESSAGES {
        let event = NewEvent {
            id: Uuid::new_v4(),
            type_name: if number == 3 { "p.poison".into() } else { "p.fine".into() },
            schema_version: 1,
            data: "{}".into(),
            metadata: Metadata::default(),
        };
        let stream = StreamId::new("p", &number.to_string()).unwrap();
        let append = Append { stream, expected: Expected::Any, events: vec![event] };
        store.commit(Commit { appends: vec![append], puts: vec![] }).await.unwrap();
    }
    let service = Service::new("poison", store.clone()).subscribe(Subscription::new("poison", Ask(id)));
    let mut runtime = Runtime::new();
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    runtime
}

async fn handled(store: &Arc<dyn EventStore>, messages: usize) {
    eventually("all messages that can be handled", async || {
        let seen = store.scan("seen", &Scan::After("".into()), 100).await.unwrap().len();
        (seen == messages).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn document_with_an_unstorable_id_is_absent_for_a_handler() {
    on_each_store(async |store| {
        let runtime = ask(&store, "a\0b").await;
        handled(&store, MESSAGES).await;
        runtime.drain(Duration::from_secs(5)).await.unwrap();
    })
    .await;
}

/// A database with a narrower character set rejects queries with characters outside that set. The error is of class 22,
/// and the store recognises it by the class alone.
#[tokio::test(flavor = "multi_thread")]
async fn read_refused_by_the_server_parks_only_its_message() {
    let name = format!("latin_{}", Uuid::new_v4().simple());
    let mut server = PgConnection::connect(&url()).await.unwrap();
    let create = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut server).await.unwrap();
    let options: PgConnectOptions = url().parse().unwrap();
    let url = options.database(&name).to_url_lossy().to_string();
    let latin = PostgresStore::connect(&url, annals_postgres::Settings::default()).await.unwrap();
    let store: Arc<dyn EventStore> = Arc::new(latin.clone());

    let asked = store.documents(&[DocumentKey::new("seen", "漢")]).await;
    assert!(matches!(asked, Err(StoreError::Refused(_))), "{asked:?}");
    let runtime = ask(&store, "漢").await;
    handled(&store, MESSAGES - 1).await;
    let letters = DeadLetters::new(store.clone());
    let letter = eventually("a dead letter", async || letters.list("poison").await.unwrap().pop()).await;
    assert!(letter.retries_at.is_none(), "another try would be refused, too");
    runtime.drain(Duration::from_secs(5)).await.unwrap();
    latin.close().await.unwrap();
    let drop = format!("DROP DATABASE {name} WITH (FORCE)");
    sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut server).await.unwrap();
}
