//! The number of connections that a store opens never exceeds the size of its pool, no matter how high the load is.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use annals::{DocumentKey, EventStore, Repository, StreamId, Version};
use annals_postgres::{PostgresStore, Settings};
use annals_tests::tally::{Tally, TallyCommand};
use futures::future::join_all;
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use uuid::Uuid;

use self::postgres::{PROMPTLY, Schema, url};

const PLACES: u32 = 4;

/// Counts incoming connections. Forwards each connection only after a delay in which its client could have given up:
/// after the first answer of the server, and after other tasks have run.
#[derive(Clone, Default)]
struct Counted {
    opened: Arc<AtomicUsize>,
    /// Connections whose client gave up before the server had accepted them.
    half_made: Arc<AtomicUsize>,
    /// Whether new connections are closed at once, as by a proxy whose server is down.
    away: Arc<AtomicBool>,
}

impl Counted {
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server: PgConnectOptions = url().parse().unwrap();
        let address = (server.get_host().to_owned(), server.get_port());
        let counted = self.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.opened.fetch_add(1, Ordering::SeqCst);
                if counted.away.load(Ordering::SeqCst) {
                    continue;
                }
                let counted = counted.clone();
                let address = address.clone();
                tokio::spawn(async move { counted.pass(client, TcpStream::connect(address).await?).await });
            }
        });
        server.host("127.0.0.1").port(port).to_url_lossy().to_string()
    }

    async fn pass(&self, mut client: TcpStream, mut server: TcpStream) -> std::io::Result<()> {
        let mut bytes = vec![0; 1 << 16];
        let length = client.read(&mut bytes).await?;
        server.write_all(&bytes[..length]).await?;
        let length = server.read(&mut bytes).await?;
        // Simulates a slow network to the server. During the delay, other sessions answer waiting reads.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        client.write_all(&bytes[..length]).await?;
        let passed = copy_bidirectional(&mut client, &mut server).await;
        if matches!(passed, Ok((sent, _)) if sent == 0) {
            self.half_made.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }
}

async fn open(url: &str, schema: &Schema) -> PostgresStore {
    let settings = Settings { schema: schema.name().into(), connections: PLACES };
    PostgresStore::connect(url, settings).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn burst_of_cold_loads_stays_within_the_connection_limit() {
    const LOADS: usize = 5_000;
    let schema = Schema::new();
    let direct: Arc<dyn EventStore> = Arc::new(schema.store().await);
    let tallies = Repository::<Tally>::new(direct);
    let made = join_all((0..LOADS).map(|id| {
        let tallies = tallies.clone();
        async move { tallies.create(&id.to_string(), TallyCommand::Add(1), Uuid::new_v4()).await }
    }));
    assert!(made.await.iter().all(Result::is_ok));

    let counted = Counted::default();
    let store = open(&counted.start().await, &schema).await;
    let before = counted.count();
    let cold = Repository::<Tally>::new(Arc::new(store.clone()));
    let mut loads = JoinSet::new();
    for id in 0..LOADS {
        let cold = cold.clone();
        let store = store.clone();
        loads.spawn(async move {
            assert_eq!(cold.state(&id.to_string()).await.unwrap().sum(), 1);
            // Also reads a document, which takes another code path than a stream.
            store.documents(&[DocumentKey::new("c", id.to_string())]).await.unwrap();
        });
    }
    loads.join_all().await;
    let opened = counted.count() - before;
    // The connection of the listener may be counted as well.
    assert!(opened <= PLACES as usize + 1, "{opened} connections for {PLACES} places");
    assert_eq!(counted.half_made.load(Ordering::SeqCst), 0, "connections that were given up half-made");
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_reads_leave_no_connection_half_open() {
    let schema = Schema::new();
    let counted = Counted::default();
    let store = open(&counted.start().await, &schema).await;
    let before = counted.count();
    for _ in 0..200 {
        let read = store.documents(&[]);
        drop(read);
        let keys = [DocumentKey::new("c", "1")];
        let mut read = std::pin::pin!(store.documents(&keys));
        // Polls the read once, then drops it.
        _ = futures::poll!(read.as_mut());
    }
    store.documents(&[DocumentKey::new("c", "1")]).await.unwrap();
    let opened = counted.count() - before;
    assert!(opened <= PLACES as usize + 1, "{opened} connections for {PLACES} places");
    assert_eq!(counted.half_made.load(Ordering::SeqCst), 0);
    store.close().await.unwrap();
}

/// All waiting callers share one schedule of reconnection attempts.
#[tokio::test(flavor = "multi_thread")]
async fn refusing_server_is_not_flooded_with_connections() {
    let schema = Schema::new();
    let counted = Counted::default();
    let store = open(&counted.start().await, &schema).await;
    counted.away.store(true, Ordering::SeqCst);
    let before = counted.count();
    let mut reads = JoinSet::new();
    for id in 0..2_000 {
        let store = store.clone();
        reads.spawn(async move {
            let stream = StreamId::new("tally", &id.to_string()).unwrap();
            _ = store.read_stream(&stream, Version::START, 10).await;
        });
    }
    let first = timeout(PROMPTLY, reads.join_next()).await.expect("the first must hear of it");
    assert!(first.is_some());
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let tried = counted.count() - before;
    assert!(tried <= 60, "{tried} connections in two seconds");
    counted.away.store(false, Ordering::SeqCst);
    timeout(PROMPTLY * 3, reads.join_all()).await.expect("the reads must be answered once the server is back");
    store.close().await.unwrap();
}
