//! A small shop: a checkout saga, which the tests break on purpose, and the services that the checker runs for the
//! saga.

use annals::{
    Event, Saga, SagaState, StepError,
    saga::{Outcome, StepRequest},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Event, Clone, Debug)]
#[event(prefix = "stock")]
pub enum Stock {
    Reserve { units: i32 },
    Release { units: i32 },
    Ship { units: i32 },
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "payment")]
pub enum Payment {
    Charge { cents: i32 },
    Refund { cents: i32 },
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "order")]
pub enum Order {
    Confirm {},
    Cancel {},
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "mail")]
pub enum Mail {
    Send { confirmed: bool },
}

/// The data of the checkout.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkout {
    pub units: i32,
    pub cents: i32,
    pub discount: i32,
}

impl SagaState for Checkout {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        if let ("reserve stock", Outcome::Done(reply)) = (step, outcome) {
            self.discount = reply["discount"].as_i64().map_or(self.discount, |cents| cents as i32);
        }
    }
}

pub fn sample() -> Checkout {
    Checkout { units: 2, cents: 50, discount: 0 }
}

pub fn reserve(it: &Checkout) -> StepRequest {
    StepRequest::to("inventory", &Stock::Reserve { units: it.units })
}
pub fn release(it: &Checkout) -> StepRequest {
    StepRequest::to("inventory", &Stock::Release { units: it.units })
}
pub fn charge(it: &Checkout) -> StepRequest {
    StepRequest::to("payment", &Payment::Charge { cents: it.cents })
}
pub fn refund(it: &Checkout) -> StepRequest {
    StepRequest::to("payment", &Payment::Refund { cents: it.cents })
}
pub fn confirm(_: &Checkout) -> StepRequest {
    StepRequest::to("order", &Order::Confirm {})
}
pub fn cancel(_: &Checkout) -> StepRequest {
    StepRequest::to("order", &Order::Cancel {})
}
pub fn ship(it: &Checkout) -> StepRequest {
    StepRequest::to("inventory", &Stock::Ship { units: it.units })
}
pub fn notify(_: &Checkout) -> StepRequest {
    StepRequest::to("mail", &Mail::Send { confirmed: true })
}
pub fn notify_cancelled(_: &Checkout) -> StepRequest {
    StepRequest::to("mail", &Mail::Send { confirmed: false })
}

pub fn checkout() -> Saga<Checkout> {
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
pub enum Placed {
    Open,
    Confirmed,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shop {
    pub free: i32,
    pub reserved: i32,
    pub shipped: i32,
    pub charged: i32,
    pub order: Placed,
    pub mails: Vec<bool>,
}

pub fn shop() -> Shop {
    Shop { free: 2, reserved: 0, shipped: 0, charged: 0, order: Placed::Open, mails: Vec::new() }
}

pub fn done() -> Result<Value, StepError> {
    Ok(Value::Null)
}

pub fn inventory(shop: &mut Shop, command: Stock) -> Result<Value, StepError> {
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

pub fn payment(shop: &mut Shop, command: Payment) -> Result<Value, StepError> {
    match command {
        Payment::Charge { cents } => shop.charged += cents,
        Payment::Refund { cents } => shop.charged -= cents,
    }
    done()
}

pub fn orders(shop: &mut Shop, command: Order) -> Result<Value, StepError> {
    match (shop.order, command) {
        (Placed::Cancelled, Order::Confirm {}) => return Err(StepError::Refused("cancelled".to_owned())),
        (_, Order::Confirm {}) => shop.order = Placed::Confirmed,
        (_, Order::Cancel {}) => shop.order = Placed::Cancelled,
    }
    done()
}

pub fn mail(shop: &mut Shop, Mail::Send { confirmed }: Mail) -> Result<Value, StepError> {
    shop.mails.push(confirmed);
    done()
}
