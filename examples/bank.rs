//! Runs the bank on an SQLite file: opens three accounts, requests three transfers, and prints the balances.
//!
//!     cargo run -p annals-examples --example bank -- bank.db

use std::{env, error::Error, sync::Arc, time::Duration};

use annals::{EventStore, LocalBus, Repository, Runtime, StreamId, Views, saga::wait_for_end};
use annals_sqlite::SqliteStore;
use bank::{
    account::{Account, AccountCommand},
    balances::Balances,
    transfer::{Transfer, TransferCommand},
};
use uuid::Uuid;

/// The id of a command. A second run sends the same commands, and changes nothing.
fn request(name: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args().nth(1).unwrap_or_else(|| "bank.db".to_owned());
    let sqlite = SqliteStore::open(path).await?;
    let store: Arc<dyn EventStore> = Arc::new(sqlite.clone());
    let mut runtime = Runtime::new();
    runtime.start(bank::services(&store), Arc::new(LocalBus::default())).await?;

    let accounts = Repository::<Account>::new(store.clone());
    for (account, owner, pence) in [("a1", "Ada", 100_000), ("a2", "Ada", 500), ("b1", "Bob", 2_000)] {
        let open = AccountCommand::Open { owner: owner.to_owned(), currency: "GBP".to_owned() };
        accounts.execute(account, open, request(&format!("open {account}"))).await?;
        let deposit = AccountCommand::Deposit { pence };
        accounts.execute(account, deposit, request(&format!("deposit {account}"))).await?;
    }

    let transfers = Repository::<Transfer>::new(store.clone());
    for (id, to, pence) in [("rent", "b1", 30_000), ("car", "b1", 30_000), ("gift", "c1", 500)] {
        let from = "a1".to_owned();
        let transfer = TransferCommand::Request { from, to: to.to_owned(), pence, currency: "GBP".to_owned() };
        transfers.execute(id, transfer, request(id)).await?;
        wait_for_end(&*store, &StreamId::new("saga.transfer", id)?, Duration::from_secs(10)).await?;
        println!("{id}: {:?}", transfers.state(id).await?);
    }

    // Handles everything that is recorded so far, and then ends the runtime.
    runtime.drain(Duration::from_secs(10)).await?;
    for (name, owner) in Views::<Balances>::new(store).list("", 100).await? {
        for (account, balance) in owner.accounts {
            println!("{name} {account}: {} pence, {}", balance.pence, balance.currency);
        }
    }
    Ok(sqlite.close().await?)
}
