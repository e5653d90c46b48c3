//! Assembles the four services.

use std::sync::Arc;

use annals::{Aggregate, EventStore, Service, saga::Runner};

use crate::{
    books::Bookkeeper,
    checkout::{Checkout, checkout},
    counting::{Counting, counting},
    inventory::{InventoryParticipant, shelf},
    notification::NotificationParticipant,
    order::{Order, OrderParticipant, Repositories, Return, Supply},
    payment::{PaymentParticipant, Provider},
    returning::{Returning, returning},
    supplying::{Supplying, supplying},
};

/// Returns the order service, which runs the sagas.
pub fn order_service(store: Arc<dyn EventStore>, repositories: Repositories) -> Service {
    let booked = [Order::CATEGORY, Return::CATEGORY, Supply::CATEGORY];
    let bookkeeper = Bookkeeper::new("order", &booked, store.clone());
    Service::new("order", store)
        .publish(&[Order::CATEGORY, Return::CATEGORY])
        .participant(OrderParticipant::new(repositories, bookkeeper))
        .saga(Runner::new(checkout(), Checkout::query(), Checkout::starts))
        .saga(Runner::new(returning(), Returning::query(), Returning::starts))
}

/// Returns the order service for services that do not share a store. This service also runs the sagas of supplies and
/// closings, which reach the inventory and payment services over the bus.
pub fn order_service_with_office(store: Arc<dyn EventStore>, repositories: Repositories) -> Service {
    order_service(store, repositories)
        .saga(Runner::new(supplying(), Supplying::query(), Supplying::starts))
        .saga(Runner::new(counting(), Counting::query(), Counting::starts))
}

/// Returns the inventory service. A single member handles all commands, because the orders share SKUs.
pub fn inventory_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("inventory", store.clone()).publish(&["stock"]).participant(InventoryParticipant::new(store))
}

/// Returns the inventory service with its shelf, a read model that people can query while the service runs.
pub fn inventory_service_with_shelf(store: Arc<dyn EventStore>) -> Service {
    inventory_service(store).project(shelf())
}

/// Returns the payment service. Each command waits for the provider, so several members handle commands in parallel.
pub fn payment_service(store: Arc<dyn EventStore>, provider: Arc<dyn Provider>) -> Service {
    let participant = PaymentParticipant::new(store.clone(), provider);
    Service::new("payment", store).publish(&["payment"]).participant(participant).members(4)
}

/// Returns the notification service.
pub fn notification_service(store: Arc<dyn EventStore>) -> Service {
    Service::new("notification", store.clone())
        .publish(&["notification"])
        .participant(NotificationParticipant::new(store))
}

/// Returns all four services on one store.
pub fn all(store: &Arc<dyn EventStore>, repositories: Repositories, provider: Arc<dyn Provider>) -> Vec<Service> {
    vec![
        order_service(store.clone(), repositories),
        inventory_service(store.clone()),
        payment_service(store.clone(), provider),
        notification_service(store.clone()),
    ]
}
