//! A fixed address for a database, as a service knows it. Like a virtual IP address or a DNS name, it may lead to
//! another server later.

use std::sync::Arc;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use super::server::Server;

/// Forwards each new connection to the current server. Open connections stay with their old server until the test cuts
/// them.
#[derive(Clone)]
pub struct VirtualAddress {
    port: u16,
    target: Arc<watch::Sender<u16>>,
    cuts: Arc<watch::Sender<u64>>,
}

impl VirtualAddress {
    pub async fn of(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = watch::Sender::new(server.port());
        let cuts = watch::Sender::new(0);
        let address = Self { port, target: Arc::new(target), cuts: Arc::new(cuts) };
        let of_task = address.clone();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let target = *of_task.target.borrow();
                let mut cut = of_task.cuts.subscribe();
                tokio::spawn(async move {
                    // Either side may close the connection at any time.
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        address
    }

    /// Makes new connections lead to `server` from now on.
    pub fn lead_to(&self, server: &Server) {
        self.target.send_replace(server.port());
    }

    /// Cuts the open connections.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }
}
