//! A service that clients call over HTTP: commands, states, views, live events, probes, metrics and `/openapi.json`.
//!
//! Run it with `cargo run -p annals-examples --example service_over_http`, and follow the events in another terminal
//! with `curl -N http://127.0.0.1:8080/events`.

use std::{env, error::Error, sync::Arc, time::Duration};

use annals::{
    Aggregate, Event, EventStore, LocalBus, LogQuery, Message, Projection, ReadModel, Repository, Runtime, Service,
    Tail, Views,
};
use annals_http::{Api, Server, aggregate, utoipa, views};
use annals_sqlite::SqliteStore;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

#[derive(Event, Clone)]
#[event(prefix = "account")]
enum AccountEvent {
    Opened { owner: String },
    Credited { owner: String, pence: u64 },
}

// ANCHOR: command
/// `{"open": {"owner": "ann"}}` or `{"credit": {"pence": 250}}`.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum AccountCommand {
    Open { owner: String },
    Credit { pence: u64 },
}

#[derive(Debug, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
enum AccountRefusal {
    #[error("there is no open account")]
    NotOpen,
    #[error("the account is open already")]
    AlreadyOpen,
    #[error("the account cannot hold so much")]
    TooMuch,
}

#[derive(Clone, Default, Serialize, ToSchema)]
struct Account {
    owner: Option<String>,
    pence: u64,
}
// ANCHOR_END: command

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Refusal = AccountRefusal;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, AccountRefusal> {
        match (command, &self.owner) {
            (AccountCommand::Open { owner }, None) => Ok(vec![AccountEvent::Opened { owner: owner.clone() }]),
            (AccountCommand::Open { .. }, Some(_)) => Err(AccountRefusal::AlreadyOpen),
            (AccountCommand::Credit { .. }, None) => Err(AccountRefusal::NotOpen),
            (AccountCommand::Credit { pence }, Some(owner)) => match self.pence.checked_add(*pence) {
                Some(_) => Ok(vec![AccountEvent::Credited { owner: owner.clone(), pence: *pence }]),
                None => Err(AccountRefusal::TooMuch),
            },
        }
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Opened { owner } => self.owner = Some(owner.clone()),
            AccountEvent::Credited { pence, .. } => self.pence += pence,
        }
    }
}

/// The number of accounts and the money of each owner.
struct Owners;

#[derive(Default, Deserialize, Serialize, ToSchema)]
struct Owner {
    accounts: u64,
    pence: u128,
}

impl ReadModel for Owners {
    const NAME: &'static str = "owners";
    type Event = AccountEvent;
    type View = Owner;

    fn keys(&self, event: &AccountEvent, _: &Message) -> Vec<String> {
        let (AccountEvent::Opened { owner } | AccountEvent::Credited { owner, .. }) = event;
        vec![owner.clone()]
    }

    fn apply(&self, _: &str, view: &mut Owner, event: &AccountEvent, _: &Message) {
        match event {
            AccountEvent::Opened { .. } => view.accounts += 1,
            AccountEvent::Credited { pence, .. } => view.pence += u128::from(*pence),
        }
    }
}

// ANCHOR: serve
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = env::var("BANK").unwrap_or_else(|_| "bank.db".to_owned());
    let store: Arc<dyn EventStore> = Arc::new(Tail::follow(Arc::new(SqliteStore::open(file).await?)).await?);
    let accounts = Repository::<Account>::new(store.clone());
    let owners = Projection::new(Owners, LogQuery::categories([Account::CATEGORY]));
    let mut runtime = Runtime::new();
    runtime.start(vec![Service::new("bank", store.clone()).project(owners)], Arc::new(LocalBus::default())).await?;

    let stop = CancellationToken::new();
    let server = Server::new(&runtime, store.clone(), stop.clone())?.grace(Duration::from_secs(1));
    let api = Api::default()
        .nest("/accounts", aggregate(accounts))
        .nest("/owners", views(Views::<Owners>::new(store.clone())))
        .merge(server.events())
        .titled("Bank", "1.0");

    let listener = TcpListener::bind(env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:8080".to_owned())).await?;
    println!("serving at http://{}, until Ctrl-C", listener.local_addr()?);
    tokio::spawn(async move {
        _ = tokio::signal::ctrl_c().await;
        stop.cancel();
    });
    server.serve(listener, api).await;
    runtime.drain(Duration::from_secs(20)).await?;
    println!("stopped");
    Ok(())
}
// ANCHOR_END: serve
