//! A proxy between the store and the server cuts the connection before or after a commit.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::sync::{Arc, Mutex};

use annals::{CommitError, EventStore, Position};
use annals_postgres::PostgresStore;
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use self::postgres::{PROMPTLY, Schema, append, numbers, url, whole_log};

/// When to cut the connection that carries a given string to the server.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Cut {
    /// Cuts before the server receives the string.
    Before,
    /// Cuts after the server has answered, and drops the answer.
    After,
    /// Same as `After`, but sends the client an error of class 08 (connection lost), as PgBouncer does.
    Told,
}

/// Returns the error of class 08 as a protocol message. Each field starts with a letter and ends with a zero byte, and
/// a further zero byte ends the message.
fn crash_report() -> Vec<u8> {
    let fields = b"SERROR\0VERROR\0C08P01\0Mserver conn crashed?\0\0";
    let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
    [b"E", &length[..], fields].concat()
}

/// Forwards all bytes, but cuts a connection once if a cut is armed.
#[derive(Clone)]
struct Proxy {
    port: u16,
    armed: Arc<Mutex<Option<(String, Cut)>>>,
}

impl Proxy {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self { port: listener.local_addr().unwrap().port(), armed: Arc::default() };
        let of_task = proxy.clone();
        tokio::spawn(async move {
            let server: PgConnectOptions = url().parse().unwrap();
            while let Ok((client, _)) = listener.accept().await {
                let proxy = of_task.clone();
                let server = (server.get_host().to_owned(), server.get_port());
                // Either side may close the connection at any time.
                tokio::spawn(async move { proxy.pass(client, TcpStream::connect(server).await?).await });
            }
        });
        proxy
    }

    async fn pass(&self, client: TcpStream, server: TcpStream) -> std::io::Result<()> {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let mut asked = vec![0; 1 << 16];
        let mut answered = vec![0; 1 << 16];
        loop {
            tokio::select! {
                length = from_client.read(&mut asked) => {
                    let length = length?;
                    let cut = self.cut(&asked[..length]);
                    if length == 0 || cut == Some(Cut::Before) {
                        return Ok(());
                    }
                    to_server.write_all(&asked[..length]).await?;
                    if let Some(cut) = cut {
                        // The server answers once the transaction has ended.
                        assert!(from_server.read(&mut answered).await? > 0, "the server went away itself");
                        if cut == Cut::Told {
                            to_client.write_all(&crash_report()).await?;
                        }
                        return Ok(());
                    }
                }
                length = from_server.read(&mut answered) => match length? {
                    0 => return Ok(()),
                    length => to_client.write_all(&answered[..length]).await?,
                },
            }
        }
    }

    fn cut(&self, asked: &[u8]) -> Option<Cut> {
        let mut armed = self.armed.lock().unwrap();
        let text = armed.as_ref().map(|(text, _)| text.clone())?;
        let found = asked.windows(text.len()).any(|part| part == text.as_bytes());
        if found { armed.take().map(|(_, cut)| cut) } else { None }
    }

    fn arm(&self, text: &str, cut: Cut) {
        *self.armed.lock().unwrap() = Some((text.to_owned(), cut));
    }

    fn url(&self) -> String {
        let server: PgConnectOptions = url().parse().unwrap();
        server.host("127.0.0.1").port(self.port).to_url_lossy().to_string()
    }
}

/// An unknown outcome is not a failure. The store sends the same commit again, and that attempt either finds that the
/// first attempt was stored, or succeeds itself. In both cases the commit is stored once.
#[tokio::test(flavor = "multi_thread")]
async fn commit_with_a_lost_answer_is_retried_and_stored_once() {
    const ROUNDS: i64 = 20;
    let schema = Schema::new();
    let proxy = Proxy::start().await;
    let store = PostgresStore::connect(&proxy.url(), schema.settings()).await.unwrap();
    let mut outside = schema.connection().await;
    for cut in [Cut::After, Cut::Before, Cut::Told] {
        let has_held = cut != Cut::Before;
        let name = format!("cut-{cut:?}").to_lowercase();
        for round in 0..ROUNDS {
            let commit = append(&name, round * 2, 2);
            proxy.arm(&name, cut);
            let outcome = timeout(PROMPTLY, store.commit(commit.clone())).await.expect("the call must not hang");
            assert!(matches!(outcome, Err(CommitError::Unknown(_))), "{cut:?}: {outcome:?}");
            let sql = "SELECT count(*) FROM annals.events WHERE stream_id = $1";
            let count = async |outside: &mut sqlx::PgConnection| -> i64 {
                sqlx::query_scalar(schema.sql(sql)).bind(&name).fetch_one(outside).await.unwrap()
            };
            let held = count(&mut outside).await;
            assert_eq!(held, round * 2 + if has_held { 2 } else { 0 }, "{cut:?}");
            match store.commit(commit).await {
                Err(CommitError::Conflict { actual, .. }) => {
                    assert_eq!((has_held, actual.0), (true, round * 2 + 2));
                }
                Ok(committed) => assert_eq!((has_held, committed.versions[0].0), (false, round * 2 + 2)),
                Err(other) => panic!("{other}"),
            }
            assert_eq!(count(&mut outside).await, round * 2 + 2);
        }
    }
    let sql = "SELECT count(*), count(DISTINCT event_id), count(DISTINCT (stream_id, version)) FROM annals.events";
    let found: (i64, i64, i64) = sqlx::query_as(schema.sql(sql)).fetch_one(&mut outside).await.unwrap();
    assert_eq!(found, (120, 120, 120));
    let log = whole_log(&store).await;
    assert_eq!(numbers(&log).len(), 120);
    assert_eq!(store.status().await.unwrap().head, log.last().unwrap().position);
}

/// A read is safe to repeat, so its caller sees no error.
#[tokio::test(flavor = "multi_thread")]
async fn read_with_a_lost_answer_is_retried() {
    let schema = Schema::new();
    let proxy = Proxy::start().await;
    let store = PostgresStore::connect(&proxy.url(), schema.settings()).await.unwrap();
    store.commit(append("read-1", 0, 3)).await.unwrap();
    let stream = annals::StreamId::parse("read-1").unwrap();
    for cut in [Cut::After, Cut::Before] {
        proxy.arm("read-1", cut);
        assert_eq!(store.read_stream(&stream, annals::Version::START, 10).await.unwrap().len(), 3);
        assert!(proxy.armed.lock().unwrap().is_none(), "nothing was cut");
    }
    assert_eq!(store.status().await.unwrap().head, Position(3));
}
