//! The repositories of the order service.

use std::sync::Arc;

use annals::{EventStore, Repository, event::named_id};
use uuid::Uuid;

use super::{aggregate::Order, closing::Closing, returns::Return, supply::Supply};

/// The aggregates that requests address by id. Customers submit orders and returns; the shop's own staff submits
/// supplies and closings.
#[derive(Clone)]
pub struct Repositories {
    pub orders: Repository<Order>,
    pub returns: Repository<Return>,
    pub supplies: Repository<Supply>,
    pub closings: Repository<Closing>,
}

impl Repositories {
    pub fn new(store: &Arc<dyn EventStore>) -> Self {
        Self {
            orders: Repository::new(store.clone()),
            returns: Repository::new(store.clone()),
            supplies: Repository::new(store.clone()),
            closings: Repository::new(store.clone()),
        }
    }
}

/// The id of the request for this order, return or supply. A repeated request has the same id.
pub fn request(category: &str, id: &str) -> Uuid {
    named_id(named_id(Uuid::NAMESPACE_OID, &format!("sample-shop {category}")), id)
}
