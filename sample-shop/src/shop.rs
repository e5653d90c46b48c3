//! The four services, put together.

use std::sync::Arc;

use annals::{EventStore, Repository, Service, saga::Runner};

use crate::{
    checkout::{Checkout, Returning, checkout, returning},
    inventory::{InventoryDesk, StockEvent},
    notification::{NotificationDesk, NotificationEvent},
    order::{Order, OrderDesk, OrderEvent, Return, ReturnEvent},
    payment::{PaymentDesk, PaymentEvent, Provider},
};

/// What customers reach: orders and returns, by id.
#[derive(Clone)]
pub struct Counter {
    pub orders: Repository<Order>,
    pub returns: Repository<Return>,
}

impl Counter {
    pub fn new(store: &Arc<dyn EventStore>) -> Self {
        Self { orders: Repository::new(store.clone()), returns: Repository::new(store.clone()) }
    }
}

/// The order service, which runs the sagas.
pub fn order_service(store: Arc<dyn EventStore>, counter: Counter) -> Service {
    Service::new("order", store.clone())
        .publish(&["order", "return"])
        .participant(OrderDesk::new(counter.orders, counter.returns))
        .saga(Runner::new(store.clone(), checkout(), Checkout::query(), Checkout::starts))
        .saga(Runner::new(store, returning(), Returning::query(), Returning::starts))
}

/// The inventory service. Its orders meet in the same SKUs, so one member takes them all.
pub fn inventory_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("inventory", store.clone()).publish(&["stock"]).participant(InventoryDesk::new(store))
}

/// The payment service. It waits for its provider, so several members take commands side by side.
pub fn payment_service(store: Arc<dyn EventStore>, provider: Arc<dyn Provider>) -> Service {
    let desk = PaymentDesk::new(store.clone(), provider);
    Service::new("payment", store).publish(&["payment"]).participant(desk).members(4)
}

/// The notification service.
pub fn notification_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("notification", store.clone()).publish(&["notification"]).participant(NotificationDesk::new(store))
}

/// The `annals` command, with what the shop knows of its events and sagas.
pub fn ops() -> annals_cli::Ops {
    annals_cli::Ops::named("sample-shop ops")
        .events::<OrderEvent>()
        .events::<ReturnEvent>()
        .events::<StockEvent>()
        .events::<PaymentEvent>()
        .events::<NotificationEvent>()
        .saga(checkout())
        .saga(returning())
}

/// All four on one store.
pub fn all(store: &Arc<dyn EventStore>, counter: Counter, provider: Arc<dyn Provider>) -> Vec<Service> {
    vec![
        order_service(store.clone(), counter),
        inventory_service(store.clone()),
        payment_service(store.clone(), provider),
        notification_service(store.clone()),
    ]
}
