//! A small bank: accounts, transfers with a daily limit, and balances by owner. The [guide] builds the bank step by
//! step.
//!
//! | file | contents |
//! |---|---|
//! | `account` | accounts, and the steps of transfers that change them |
//! | `currency` | upcasters for data from the time when the bank had pounds only |
//! | `limit` | how much an account may transfer on one day |
//! | `transfer` | transfers, the saga that carries them out, and its earlier plan |
//! | `balances` | the read model: accounts and balances by owner |
//!
//! [guide]: ../../docs/guide/README.md
#![allow(missing_docs, reason = "the names of variants and fields say what they hold")]

pub mod account;
pub mod balances;
mod currency;
pub mod limit;
pub mod transfer;

use std::sync::Arc;

use annals::{Aggregate, EventStore, LogQuery, Projection, Service};

use crate::{account::Account, balances::Balances};

// ANCHOR: services
/// Returns the services of the bank. All services use this store here, but each could have its own store.
pub fn services(store: &Arc<dyn EventStore>) -> Vec<Service> {
    let balances = Projection::new(Balances, LogQuery::categories([Account::CATEGORY]));
    vec![
        Service::new("accounts", store.clone()).participant(account::Teller::new(store.clone())).project(balances),
        Service::new("limits", store.clone()).participant(limit::Guard::new(store.clone())),
        Service::new("transfers", store.clone())
            .participant(transfer::Clerk::new(store.clone()))
            .saga(transfer::runner()),
    ]
}
// ANCHOR_END: services
