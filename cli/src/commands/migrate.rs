//! `migrate`: the only command that creates a store or changes its schema.

use clap::Args;
use serde::Serialize;

use crate::{
    failure::{Failure, Verdict},
    output::Output,
    store::{Open, OpenError, Store, StoreUrl},
};

#[derive(Debug, Args)]
#[command(after_help = "Example:
  annals migrate --store postgres://owner@localhost/shop
      run this as a role that may create schemas; the roles of the services then need no such permission")]
pub(crate) struct MigrateArgs {}

#[derive(Serialize)]
struct Migrated {
    store: String,
    outcome: &'static str,
}

pub(crate) async fn run(_: MigrateArgs, url: &StoreUrl, schema: &str, output: &mut Output) -> Result<Verdict, Failure> {
    let (store, outcome) = match Store::open(url, schema, Open::Existing).await {
        Ok(store) => (store, "up to date"),
        Err(error) => {
            let outcome = match &error {
                OpenError::Missing => "created",
                OpenError::Outdated => "migrated",
                OpenError::Renamed(_) => "made anew under its name",
                OpenError::Other(_) => return Err(error.into_failure(url, schema)),
            };
            let opened = Store::open(url, schema, Open::Migrate).await;
            (opened.map_err(|error| error.into_failure(url, schema))?, outcome)
        }
    };
    store.close().await?;
    if output.json {
        output.value(&Migrated { store: url.to_string(), outcome })?;
    } else {
        output.line(&format!("{url}: {outcome}"))?;
    }
    output.flush()?;
    Ok(Verdict::Fine)
}
