//! The read model: accounts and balances by owner.

use std::collections::BTreeMap;

use annals::{Message, ReadModel, StreamId};
use serde::{Deserialize, Serialize};

use crate::account::AccountEvent;

// ANCHOR: model
/// The accounts of one owner, by id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    /// The open accounts.
    pub accounts: BTreeMap<String, Balance>,
}

/// The balance of one account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    pub pence: u64,
    pub currency: String,
}

/// Keeps one view per owner.
pub struct Balances;

impl ReadModel for Balances {
    const NAME: &'static str = "balances";
    type Event = AccountEvent;
    type View = Owner;

    fn keys(&self, event: &AccountEvent, _: &Message) -> Vec<String> {
        let (AccountEvent::Opened { owner, .. }
        | AccountEvent::Deposited { owner, .. }
        | AccountEvent::Debited { owner, .. }
        | AccountEvent::Refunded { owner, .. }
        | AccountEvent::Credited { owner, .. }
        | AccountEvent::Closed { owner }) = event;
        vec![owner.clone()]
    }

    fn apply(&self, _: &str, view: &mut Owner, event: &AccountEvent, message: &Message) {
        let stream = StreamId::from_stored(&message.subject);
        let account = view.accounts.entry(stream.id().to_owned()).or_default();
        match event {
            AccountEvent::Opened { currency, .. } => account.currency = currency.clone(),
            AccountEvent::Deposited { pence, .. }
            | AccountEvent::Refunded { pence, .. }
            | AccountEvent::Credited { pence, .. } => account.pence += pence,
            AccountEvent::Debited { pence, .. } => account.pence -= pence,
            AccountEvent::Closed { .. } => _ = view.accounts.remove(stream.id()),
        }
    }
}
// ANCHOR_END: model
