//! Assembles the four services.

use std::sync::Arc;

use annals::{Aggregate, EventStore, Repository, Service, event::named_id, saga::Runner};
use uuid::Uuid;

use crate::{
    books::Bookkeeper,
    checkout::{Checkout, Returning, checkout, returning},
    closing::{Closing, ClosingEvent, Counting, counting},
    inventory::{InventoryDesk, StockEvent},
    notification::{NotificationDesk, NotificationEvent},
    order::{Order, OrderDesk, OrderEvent, Return, ReturnEvent},
    payment::{PaymentDesk, PaymentEvent, Provider},
    shelf::shelf,
    supply::{Supply, SupplyEvent, Supplying, supplying},
};

/// The aggregates that customers and the back office address by id.
#[derive(Clone)]
pub struct Counter {
    pub orders: Repository<Order>,
    pub returns: Repository<Return>,
    pub supplies: Repository<Supply>,
    pub closings: Repository<Closing>,
}

impl Counter {
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

/// Returns the order service, which runs the sagas.
pub fn order_service(store: Arc<dyn EventStore>, counter: Counter) -> Service {
    let booked = [Order::CATEGORY, Return::CATEGORY, Supply::CATEGORY];
    let bookkeeper = Bookkeeper::new("order", &booked, store.clone());
    Service::new("order", store.clone())
        .publish(&[Order::CATEGORY, Return::CATEGORY])
        .participant(OrderDesk::new(counter.orders, counter.returns, counter.closings, bookkeeper))
        .saga(Runner::new(store.clone(), checkout(), Checkout::query(), Checkout::starts))
        .saga(Runner::new(store, returning(), Returning::query(), Returning::starts))
}

/// Returns the order service with its back office, for services that do not share a store. The order service then
/// reaches the inventory and payment services over the bus.
pub fn order_service_with_office(store: Arc<dyn EventStore>, counter: Counter) -> Service {
    order_service(store.clone(), counter)
        .saga(Runner::new(store.clone(), supplying(), Supplying::query(), Supplying::starts))
        .saga(Runner::new(store, counting(), Counting::query(), Counting::starts))
}

/// Returns the inventory service. A single member handles all commands, because the orders share SKUs.
pub fn inventory_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("inventory", store.clone()).publish(&["stock"]).participant(InventoryDesk::new(store))
}

/// Returns the inventory service with its shelf, a read model that people can query while the service runs.
pub fn inventory_service_with_shelf(store: Arc<dyn EventStore>) -> Service {
    inventory_service(store).project(shelf())
}

/// Returns the payment service. Each command waits for the provider, so several members handle commands in parallel.
pub fn payment_service(store: Arc<dyn EventStore>, provider: Arc<dyn Provider>) -> Service {
    let desk = PaymentDesk::new(store.clone(), provider);
    Service::new("payment", store).publish(&["payment"]).participant(desk).members(4)
}

/// Returns the notification service.
pub fn notification_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("notification", store.clone()).publish(&["notification"]).participant(NotificationDesk::new(store))
}

/// Returns the `annals` command, with the shop's events, sagas and read models.
pub fn ops() -> annals_cli::Ops {
    annals_cli::Ops::named("sample-shop ops")
        .events::<OrderEvent>()
        .events::<ReturnEvent>()
        .events::<StockEvent>()
        .events::<PaymentEvent>()
        .events::<NotificationEvent>()
        .events::<SupplyEvent>()
        .events::<ClosingEvent>()
        .saga(checkout())
        .saga(returning())
        .saga(supplying())
        .saga(counting())
        .read_model(shelf())
}

/// Returns all four services on one store.
pub fn all(store: &Arc<dyn EventStore>, counter: Counter, provider: Arc<dyn Provider>) -> Vec<Service> {
    vec![
        order_service(store.clone(), counter),
        inventory_service(store.clone()),
        payment_service(store.clone(), provider),
        notification_service(store.clone()),
    ]
}
