//! The saga checker: good sagas end clean whatever happens, broken ones are caught, each by its shortest history.
#![allow(clippy::unwrap_used)]

use annals::{
    Event, Saga, SagaState, StepError,
    saga::{Outcome, Request, Status},
    testing::{Check, Violation, check},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Event, Clone, Debug)]
#[event(prefix = "stock")]
enum Stock {
    Reserve { units: i32 },
    Release { units: i32 },
    Ship { units: i32 },
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "payment")]
enum Payment {
    Charge { cents: i32 },
    Refund { cents: i32 },
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "order")]
enum Order {
    Confirm {},
    Cancel {},
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "mail")]
enum Mail {
    Send { confirmed: bool },
}

/// What the checkout knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Checkout {
    units: i32,
    cents: i32,
    discount: i32,
}

impl SagaState for Checkout {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        if let ("reserve stock", Outcome::Done(reply)) = (step, outcome) {
            self.discount = reply["discount"].as_i64().unwrap_or_default() as i32;
        }
    }
}

fn sample() -> Checkout {
    Checkout { units: 2, cents: 50, discount: 0 }
}

fn reserve(it: &Checkout) -> Request {
    Request::to("inventory", &Stock::Reserve { units: it.units })
}
fn release(it: &Checkout) -> Request {
    Request::to("inventory", &Stock::Release { units: it.units })
}
fn charge(it: &Checkout) -> Request {
    Request::to("payment", &Payment::Charge { cents: it.cents })
}
fn refund(it: &Checkout) -> Request {
    Request::to("payment", &Payment::Refund { cents: it.cents })
}
fn confirm(_: &Checkout) -> Request {
    Request::to("order", &Order::Confirm {})
}
fn cancel(_: &Checkout) -> Request {
    Request::to("order", &Order::Cancel {})
}
fn ship(it: &Checkout) -> Request {
    Request::to("inventory", &Stock::Ship { units: it.units })
}
fn notify(_: &Checkout) -> Request {
    Request::to("mail", &Mail::Send { confirmed: true })
}
fn notify_cancelled(_: &Checkout) -> Request {
    Request::to("mail", &Mail::Send { confirmed: false })
}

fn checkout() -> Saga<Checkout> {
    Saga::named("checkout")
        .compensatable("reserve stock", reserve)
        .undo(release)
        .compensatable("charge card", charge)
        .undo(refund)
        .pivot("confirm order", confirm)
        .retriable("ship", ship)
        .retriable("notify customer", notify)
        .when_compensated("cancel order", cancel)
        .when_compensated("notify of cancellation", notify_cancelled)
        .deadline(std::time::Duration::from_secs(60))
        .build()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Placed {
    Open,
    Confirmed,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shop {
    free: i32,
    reserved: i32,
    shipped: i32,
    charged: i32,
    order: Placed,
    mails: Vec<bool>,
}

fn shop() -> Shop {
    Shop { free: 2, reserved: 0, shipped: 0, charged: 0, order: Placed::Open, mails: Vec::new() }
}

fn done() -> Result<Value, StepError> {
    Ok(Value::Null)
}

fn inventory(shop: &mut Shop, command: Stock) -> Result<Value, StepError> {
    match command {
        Stock::Reserve { units } if shop.free < units => return Err(StepError::Refused("out of stock".to_owned())),
        Stock::Reserve { units } => {
            shop.free -= units;
            shop.reserved += units;
            return Ok(json!({ "discount": 5 }));
        }
        Stock::Release { units } => {
            shop.reserved -= units;
            shop.free += units;
        }
        Stock::Ship { units } => {
            shop.reserved -= units;
            shop.shipped += units;
        }
    }
    done()
}

fn payment(shop: &mut Shop, command: Payment) -> Result<Value, StepError> {
    match command {
        Payment::Charge { cents } => shop.charged += cents,
        Payment::Refund { cents } => shop.charged -= cents,
    }
    done()
}

fn orders(shop: &mut Shop, command: Order) -> Result<Value, StepError> {
    match (shop.order, command) {
        (Placed::Cancelled, Order::Confirm {}) => return Err(StepError::Refused("cancelled".to_owned())),
        (_, Order::Confirm {}) => shop.order = Placed::Confirmed,
        (_, Order::Cancel {}) => shop.order = Placed::Cancelled,
    }
    done()
}

fn mail(shop: &mut Shop, Mail::Send { confirmed }: Mail) -> Result<Value, StepError> {
    shop.mails.push(confirmed);
    done()
}

/// A checkout by `saga` in the shop, with everything that must hold there.
fn in_the_shop(saga: Saga<Checkout>) -> Check<Checkout, Shop> {
    with_inventory(saga, inventory)
}

fn with_inventory(
    saga: Saga<Checkout>,
    inventory: fn(&mut Shop, Stock) -> Result<Value, StepError>,
) -> Check<Checkout, Shop> {
    check(saga, sample())
        .world(shop())
        .service("inventory", inventory)
        .service("payment", payment)
        .service("order", orders)
        .service("mail", mail)
        .always("no unit comes or goes by itself", |shop| shop.free + shop.reserved + shop.shipped == 2)
        .always("nothing ships unpaid", |shop| shop.shipped == 0 || shop.charged > 0)
        .at_end("a customer pays for what ships, and for nothing else", |shop, _| shop.charged == shop.shipped * 25)
        .at_end("nothing stays reserved", |shop, _| shop.reserved == 0)
        .at_end("the customer hears once how it ended", |shop, status| shop.mails == [status == Status::Completed])
        .at_end("the order says how it ended", |shop, status| match status {
            Status::Completed => shop.order == Placed::Confirmed,
            _ => shop.order == Placed::Cancelled,
        })
}

/// The violation that everything together finds.
fn caught(check: Check<Checkout, Shop>) -> Violation {
    let violation = check.everything().run().unwrap_err();
    println!("{violation}");
    violation
}

#[test]
fn a_good_checkout_ends_clean_whatever_happens() {
    let report = in_the_shop(checkout()).everything().ends_clean();
    println!("{report:?}");
    assert!(report.states > 1_000, "{report:?}");
}
