//! The `annals` command as a subcommand of the shop.

use crate::{
    checkout::checkout,
    counting::counting,
    inventory::{StockEvent, shelf},
    notification::NotificationEvent,
    order::{ClosingEvent, OrderEvent, ReturnEvent, SupplyEvent},
    payment::PaymentEvent,
    returning::returning,
    supplying::supplying,
};

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
