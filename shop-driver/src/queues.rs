//! Queues for scarce stock: an invoice waits for the earlier invoices that share a SKU with it.

use std::collections::{BTreeSet, HashMap};

use tokio::sync::watch;

use crate::input::Invoice;

/// For each SKU, the last invoice in its queue.
#[derive(Default)]
pub(crate) struct Queues {
    last: HashMap<String, watch::Receiver<()>>,
}

/// The position of an invoice in the queues of all its SKUs. Dropping this value lets the next invoices proceed.
#[derive(Default)]
pub(crate) struct QueuePlace {
    earlier: Vec<watch::Receiver<()>>,
    _mine: Option<watch::Sender<()>>,
}

impl Queues {
    /// Puts the invoice at the end of the queues of its SKUs.
    pub fn join(&mut self, invoice: &Invoice) -> QueuePlace {
        let (mine, served) = watch::channel(());
        let skus: BTreeSet<&str> = invoice.skus().collect();
        let earlier = skus.into_iter().filter_map(|sku| self.last.insert(sku.to_owned(), served.clone())).collect();
        QueuePlace { earlier, _mine: Some(mine) }
    }
}

impl QueuePlace {
    /// Waits until every earlier invoice in these queues is done.
    pub async fn is_first(&self) {
        for earlier in &self.earlier {
            // `changed` fails once the earlier invoice drops its sender. The failure is the signal to proceed.
            while earlier.clone().changed().await.is_ok() {}
        }
    }
}
