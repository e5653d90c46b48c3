//! Counts the connections that a customer opens, with a proxy between the customer and the shop.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod serving;

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use self::serving::Serving;

#[derive(Default)]
struct Counted {
    open: AtomicUsize,
    most: AtomicUsize,
    all: AtomicUsize,
}

/// A connection that is open until one of its sides ends it.
struct Open {
    counted: Arc<Counted>,
    ended: AtomicBool,
}

impl Open {
    fn new(counted: &Arc<Counted>) -> Self {
        counted.all.fetch_add(1, Ordering::SeqCst);
        counted.most.fetch_max(counted.open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Self { counted: counted.clone(), ended: AtomicBool::new(false) }
    }

    fn end(&self) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            self.counted.open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Forwards connections to `to`, and counts them.
fn counting(to: SocketAddr) -> (SocketAddr, Arc<Counted>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let counted = Arc::<Counted>::default();
    let counts = counted.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            let open = Arc::new(Open::new(&counts));
            std::thread::spawn(move || match TcpStream::connect(to) {
                Ok(server) => {
                    let from = client.try_clone().unwrap();
                    let into = server.try_clone().unwrap();
                    let other = open.clone();
                    std::thread::spawn(move || pass(server, client, &other));
                    pass(from, into, &open);
                }
                Err(_) => open.end(),
            });
        }
    });
    (at, counted)
}

/// Forwards bytes until one side ends. The connection no longer counts as open by the time the other side can notice
/// the end and reconnect.
fn pass(mut from: TcpStream, mut into: TcpStream, open: &Open) {
    let mut buffer = [0; 8_192];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        if into.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    open.end();
    _ = into.shutdown(Shutdown::Both);
    _ = from.shutdown(Shutdown::Both);
}

#[test]
fn burst_opens_no_more_connections_than_allowed() {
    const PLACES: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let mut shop = Serving::all(&format!("sqlite:{}", folder.path().join("shop.db").display()));
    let (at, counted) = counting(shop.at);
    let url = format!("http://{at}");
    let arguments = ["--concurrency", "8", "--generate", "400", "--cancel-rate", "0.2", "--stock-factor", "1.5"];
    let mut customer = shop.customer_at(&url, &arguments).spawn().unwrap();
    // Some requests are in progress when the shop is killed, and all clients reconnect at once.
    while shop.get("/metrics").text.lines().all(|line| !line.starts_with("shop_taken_in_total{kind=\"order\"} ")) {
        assert!(customer.try_wait().unwrap().is_none());
    }
    shop = shop.kill_and_restart();
    let output = customer.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let [most, all] = [&counted.most, &counted.all].map(|count| count.load(Ordering::SeqCst));
    println!("{all} connections, {most} at once");
    assert!(most <= PLACES, "{most} connections at once");
    drop(shop);
}
