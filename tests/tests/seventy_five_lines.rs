//! A whole aggregate: five events, four commands, their refusals, the state, `decide` and `evolve`.

use annals::{Aggregate, Event};

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
enum OrderEvent {
    Placed { sku: String, pence: u64 },
    Paid { receipt: String },
    Shipped { parcel: String },
    Refunded { receipt: String },
    Cancelled { reason: String },
}

#[derive(Clone, Debug)]
enum OrderCommand {
    Place { sku: String, pence: u64 },
    Pay { receipt: String },
    Ship { parcel: String },
    Cancel { reason: String },
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
enum OrderRefusal {
    #[error("there is no such order")]
    NotPlaced,
    #[error("the order is not paid")]
    NotPaid,
    #[error("the order is {0}")]
    Over(&'static str),
}

#[derive(Clone, Debug, Default, PartialEq)]
enum Order {
    #[default]
    Unknown,
    Placed,
    Paid(String),
    Shipped,
    Cancelled,
}

impl Aggregate for Order {
    const CATEGORY: &'static str = "order";
    type Command = OrderCommand;
    type Event = OrderEvent;
    type Refusal = OrderRefusal;

    fn decide(&self, command: &OrderCommand) -> Result<Vec<OrderEvent>, OrderRefusal> {
        use {Order as Is, OrderCommand as Do, OrderEvent as Now};
        match (self, command.clone()) {
            (Is::Unknown, Do::Place { sku, pence }) => Ok(vec![Now::Placed { sku, pence }]),
            (Is::Unknown, _) => Err(OrderRefusal::NotPlaced),
            (Is::Placed, Do::Pay { receipt }) => Ok(vec![Now::Paid { receipt }]),
            (Is::Placed, Do::Ship { .. }) => Err(OrderRefusal::NotPaid),
            (Is::Placed, Do::Cancel { reason }) => Ok(vec![Now::Cancelled { reason }]),
            (Is::Paid(_), Do::Ship { parcel }) => Ok(vec![Now::Shipped { parcel }]),
            (Is::Paid(paid), Do::Cancel { reason }) => {
                Ok(vec![Now::Refunded { receipt: paid.clone() }, Now::Cancelled { reason }])
            }
            (Is::Shipped, Do::Cancel { .. }) => Err(OrderRefusal::Over("shipped")),
            (Is::Cancelled, Do::Pay { .. } | Do::Ship { .. }) => Err(OrderRefusal::Over("cancelled")),
            (_, Do::Place { .. } | Do::Pay { .. } | Do::Ship { .. } | Do::Cancel { .. }) => Ok(vec![]),
        }
    }

    fn evolve(&mut self, event: &OrderEvent) {
        *self = match event {
            OrderEvent::Placed { .. } | OrderEvent::Refunded { .. } => Self::Placed,
            OrderEvent::Paid { receipt } => Self::Paid(receipt.clone()),
            OrderEvent::Shipped { .. } => Self::Shipped,
            OrderEvent::Cancelled { .. } => Self::Cancelled,
        }
    }
}

#[allow(clippy::unwrap_used)]
mod specification {
    use super::*;

    fn after(history: &[OrderEvent]) -> Order {
        let mut order = Order::default();
        history.iter().for_each(|event| order.evolve(event));
        order
    }

    fn placed() -> OrderEvent {
        OrderEvent::Placed { sku: "85123A".into(), pence: 255 }
    }

    fn paid() -> OrderEvent {
        OrderEvent::Paid { receipt: "r1".into() }
    }

    fn cancel() -> OrderCommand {
        OrderCommand::Cancel { reason: "too late".into() }
    }

    #[test]
    fn a_paid_order_is_refunded_when_it_is_cancelled() {
        let refunded = OrderEvent::Refunded { receipt: "r1".into() };
        let reason = "too late".into();
        let wanted = vec![refunded, OrderEvent::Cancelled { reason }];
        let history = [placed(), paid()];
        assert_eq!(after(&history).decide(&cancel()), Ok(wanted.clone()));
        assert_eq!(after(&[&history[..], &wanted].concat()), Order::Cancelled);
    }

    #[test]
    fn an_order_is_placed_once() {
        let place = OrderCommand::Place { sku: "85123A".into(), pence: 255 };
        assert_eq!(after(&[]).decide(&place), Ok(vec![placed()]));
        assert_eq!(after(&[placed()]).decide(&place), Ok(vec![]));
    }

    #[test]
    fn finished_work_is_not_repeated() {
        assert_eq!(after(&[placed(), paid()]).decide(&OrderCommand::Pay { receipt: "r2".into() }), Ok(vec![]));
    }

    #[test]
    fn impossible_commands_are_refused() {
        let shipped = [placed(), paid(), OrderEvent::Shipped { parcel: "p1".into() }];
        let ship = OrderCommand::Ship { parcel: "p1".into() };
        assert_eq!(after(&[]).decide(&ship), Err(OrderRefusal::NotPlaced));
        assert_eq!(after(&[placed()]).decide(&ship), Err(OrderRefusal::NotPaid));
        assert_eq!(after(&shipped).decide(&cancel()), Err(OrderRefusal::Over("shipped")));
    }

    #[test]
    fn aggregate_takes_75_lines_and_at_most_7_library_names() {
        let source = include_str!("seventy_five_lines.rs");
        let aggregate = source.split_once("\n#[allow(clippy::unwrap_used)]\nmod specification").unwrap().0.trim_end();
        assert!(aggregate.lines().count() <= 75, "the aggregate has {} lines", aggregate.lines().count());
        assert_eq!(OrderEvent::TYPES.len(), 5);

        // This one import brings in all names of the library; the code uses no other path into the library.
        let imported = aggregate.split_once("use annals::{").unwrap().1.split_once('}').unwrap().0;
        let names: Vec<&str> = imported.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        assert!(names.len() <= 7, "{names:?}");
        assert_eq!(aggregate.matches("annals::").count(), 1);
    }
}
