//! Simulates network latency on one machine, with a proxy in front of a server.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// The number of bytes per read.
const CHUNK: usize = 64 * 1_024;
/// The maximum number of chunks in flight in one direction of a connection: far more than any client sends ahead.
const CHUNKS: usize = 4_096;

/// A proxy that forwards bytes in each direction after a delay. Dropping the value stops the proxy.
pub struct Distance {
    port: u16,
    accepted: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Distance {
    /// Starts a proxy in front of a server on this machine.
    ///
    /// # Errors
    /// Returns an error if no port is free.
    pub async fn to(server: u16, one_way: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let accepted = Arc::<AtomicUsize>::default();
        let counted = accepted.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], server))).await else {
                        return;
                    };
                    _ = client.set_nodelay(true);
                    _ = server.set_nodelay(true);
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    tokio::join!(pass(from_client, to_server, one_way), pass(from_server, to_client, one_way));
                });
            }
        });
        Ok(Self { port, accepted, accepting })
    }

    /// The port of the proxy, to which clients connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The number of connections that the proxy has accepted.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

async fn pass(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, delay: Duration) {
    let (sender, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let reading = async move {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if sender.send((Instant::now() + delay, buffer[..count].to_vec())).await.is_err() {
                break;
            }
        }
    };
    let writing = async move {
        while let Some((at, chunk)) = chunks.recv().await {
            sleep_until(at).await;
            if to.write_all(&chunk).await.is_err() {
                break;
            }
        }
        _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}
