use std::{env, sync::Arc, time::Duration};

use annals::{EventStore, LocalBus, Repository, Runtime, Views};
use annals_postgres::{PostgresStore, Settings};
use annals_sqlite::SqliteStore;
use bank::{
    account::{Account, AccountCommand},
    balances::Balances,
    limit::DAILY_LIMIT,
    transfer::{Transfer, TransferCommand},
};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use crate::{Outcome, ended};

/// Returns the balance of each account of an owner, as the read model shows them.
async fn balances(views: &Views<Balances>, owner: &str) -> Result<Vec<(String, u64)>, Box<dyn std::error::Error>> {
    let view = views.get(owner).await?.unwrap_or_default();
    Ok(view.accounts.into_iter().map(|(id, account)| (id, account.pence)).collect())
}

/// Requests transfers that complete, and transfers that are refused at each of the steps.
async fn transfers_end_and_the_money_adds_up(store: Arc<dyn EventStore>) -> Outcome {
    let mut runtime = Runtime::new();
    runtime.start(bank::services(&store), Arc::new(LocalBus::default())).await?;
    let accounts = Repository::<Account>::new(store.clone());
    for (account, owner, currency, pence) in
        [("a", "Ada", "GBP", DAILY_LIMIT + 1_000), ("b", "Bob", "GBP", 0), ("e", "Bob", "EUR", 0)]
    {
        let open = AccountCommand::Open { owner: owner.to_owned(), currency: currency.to_owned() };
        accounts.execute(account, open, Uuid::new_v4()).await?;
        accounts.execute(account, AccountCommand::Deposit { pence }, Uuid::new_v4()).await?;
    }
    let transfers = Repository::<Transfer>::new(store.clone());
    let rejected = |reason: &str| Transfer::Rejected(reason.to_owned());
    let cases = [
        ("1", "a", "b", DAILY_LIMIT - 500, Transfer::Completed),
        ("2", "a", "b", 501, rejected("only 500 pence of the daily limit are left")),
        ("3", "a", "nobody", 500, rejected("there is no open account")),
        // The limit that transfer 3 reserved is free again.
        ("4", "a", "e", 500, rejected("the account is in EUR")),
        ("5", "b", "a", DAILY_LIMIT, rejected(&format!("the account holds only {} pence", DAILY_LIMIT - 500))),
        ("6", "a", "b", 500, Transfer::Completed),
    ];
    for (id, from, to, pence, wanted) in cases {
        let request =
            TransferCommand::Request { from: from.to_owned(), to: to.to_owned(), pence, currency: "GBP".to_owned() };
        transfers.execute(id, request, Uuid::new_v4()).await?;
        let ended = tokio::time::timeout(Duration::from_secs(60), ended(&transfers, id)).await??;
        assert_eq!(ended, wanted, "transfer {id}");
    }
    runtime.drain(Duration::from_secs(20)).await?;
    let views = Views::<Balances>::new(store);
    assert_eq!(balances(&views, "Ada").await?, [("a".to_owned(), 1_000)]);
    assert_eq!(balances(&views, "Bob").await?, [("b".to_owned(), DAILY_LIMIT), ("e".to_owned(), 0)]);
    Ok(())
}

#[tokio::test]
async fn bank_works_on_sqlite() -> Outcome {
    let folder = tempfile::tempdir()?;
    let store = SqliteStore::open(folder.path().join("bank.db")).await?;
    transfers_end_and_the_money_adds_up(Arc::new(store)).await
}

#[tokio::test]
async fn bank_works_on_postgresql() -> Outcome {
    let url = env::var("DATABASE_URL").map_err(|_| "DATABASE_URL is not set: run the tests with `./test`")?;
    let schema = format!("bank_{}", Uuid::new_v4().simple());
    let separator = if url.contains('?') { '&' } else { '?' };
    let store = PostgresStore::connect(&format!("{url}{separator}schema={schema}"), Settings::default()).await?;
    let outcome = transfers_end_and_the_money_adds_up(Arc::new(store)).await;
    let mut sql = PgConnection::connect(&url).await?;
    sqlx::raw_sql(AssertSqlSafe(format!("DROP SCHEMA {schema} CASCADE"))).execute(&mut sql).await?;
    outcome
}
