//! The four services, put together.

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

/// What customers and the back office reach, by id.
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

/// Who asks for the order, the return or the supply of this id: whoever asks again asks the same.
pub fn request(category: &str, id: &str) -> Uuid {
    named_id(named_id(Uuid::NAMESPACE_OID, &format!("sample-shop {category}")), id)
}

/// The order service, which runs the sagas.
pub fn order_service(store: Arc<dyn EventStore>, counter: Counter) -> Service {
    let booked = [Order::CATEGORY, Return::CATEGORY, Supply::CATEGORY];
    let bookkeeper = Bookkeeper::new("order", &booked, store.clone());
    Service::new("order", store.clone())
        .publish(&[Order::CATEGORY, Return::CATEGORY])
        .participant(OrderDesk::new(counter.orders, counter.returns, counter.closings, bookkeeper))
        .saga(Runner::new(store.clone(), checkout(), Checkout::query(), Checkout::starts))
        .saga(Runner::new(store, returning(), Returning::query(), Returning::starts))
}

/// The order service with its back office, for services that are apart: what inventory and payment know of is asked for
/// over the bus.
pub fn order_service_with_office(store: Arc<dyn EventStore>, counter: Counter) -> Service {
    order_service(store.clone(), counter)
        .saga(Runner::new(store.clone(), supplying(), Supplying::query(), Supplying::starts))
        .saga(Runner::new(store, counting(), Counting::query(), Counting::starts))
}

/// The inventory service. Its orders meet in the same SKUs, so one member takes them all.
pub fn inventory_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("inventory", store.clone()).publish(&["stock"]).participant(InventoryDesk::new(store))
}

/// The inventory service with its shelf, which people look at while it serves.
pub fn inventory_service_with_shelf(store: Arc<dyn EventStore>) -> Service {
    inventory_service(store).project(shelf())
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

/// The `annals` command, with what the shop knows of its events, sagas and views.
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

/// All four on one store.
pub fn all(store: &Arc<dyn EventStore>, counter: Counter, provider: Arc<dyn Provider>) -> Vec<Service> {
    vec![
        order_service(store.clone(), counter),
        inventory_service(store.clone()),
        payment_service(store.clone(), provider),
        notification_service(store.clone()),
    ]
}
