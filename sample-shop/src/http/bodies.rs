//! The bodies of requests and answers, as JSON.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, IntoDeserializer},
};

use super::json::{Object, whole_number};
use crate::{
    card::Card,
    inventory::Change,
    order::{Line, ShopBooks},
};

/// The header with the idempotency key of a request. The key becomes the id of the new order, return, supply or
/// closing, so a repeated request with the same key creates nothing new.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The header that marks the answer to a repeated request.
pub const REPLAYED: &str = "idempotency-replayed";
/// The status of a saga that is waiting for an operator.
pub const STUCK: &str = "stuck";

/// The body of `POST /orders`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewOrder {
    /// The customer; `null` for a guest.
    #[serde(default)]
    pub customer: Option<String>,
    /// The goods and their prices.
    #[serde(deserialize_with = "lines")]
    pub lines: Vec<Line>,
    /// A test card; [`Card::Good`] by default.
    #[serde(default, skip_serializing_if = "Card::is_good", deserialize_with = "card")]
    pub card: Card,
}

/// The body of `POST /returns`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewReturn {
    /// The customer; `null` for a guest.
    #[serde(default)]
    pub customer: Option<String>,
    /// The goods that come back, and the prices to refund.
    #[serde(deserialize_with = "lines")]
    pub lines: Vec<Line>,
}

/// A line in a request. Stored lines accept unknown fields, because later builds may add fields. A request with an
/// unknown field is rejected.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedLine {
    sku: String,
    #[serde(deserialize_with = "whole_number")]
    quantity: u32,
    #[serde(deserialize_with = "amount")]
    unit_price: Decimal,
}

fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Line>, D::Error> {
    let lines = Vec::<Object<AskedLine>>::deserialize(deserializer)?.into_iter();
    let line = |Object(AskedLine { sku, quantity, unit_price })| Line { sku, quantity, unit_price };
    Ok(lines.map(line).collect())
}

/// Reads a card from its name only. The derived `Deserialize` of an enum also accepts objects, and its errors about
/// numbers are unclear.
fn card<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Card, D::Error> {
    Card::deserialize(String::deserialize(deserializer)?.into_deserializer())
}

fn amount<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Decimal, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.strip_prefix('-').unwrap_or(&text);
    let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let amount = text.parse().ok().filter(|_| is_plain);
    amount
        .ok_or_else(|| D::Error::custom(format!("the price {text:.40?} is not an amount; a valid amount is \"2.55\"")))
}

/// The body of `POST /supplies`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "AskedSupply")]
pub enum NewSupply {
    /// A delivery of goods.
    Delivered(Vec<Change>),
    /// A stock count.
    Adjusted(Vec<Change>),
}

/// A supply in a request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedSupply {
    delivered: Option<Vec<Object<AskedChange>>>,
    adjusted: Option<Vec<Object<AskedChange>>>,
}

/// A change of the stock of one SKU, in a request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedChange {
    sku: String,
    #[serde(deserialize_with = "whole_number")]
    quantity: i64,
}

impl TryFrom<AskedSupply> for NewSupply {
    type Error = &'static str;

    fn try_from(AskedSupply { delivered, adjusted }: AskedSupply) -> Result<Self, Self::Error> {
        let change = |Object(AskedChange { sku, quantity })| Change { sku, quantity };
        match (delivered, adjusted) {
            (Some(units), None) => Ok(Self::Delivered(units.into_iter().map(change).collect())),
            (None, Some(units)) => Ok(Self::Adjusted(units.into_iter().map(change).collect())),
            _ => Err("there must be either `delivered` or `adjusted`"),
        }
    }
}

/// The answer to `GET /orders/{id}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrderView {
    pub order_id: String,
    /// `placed`, `confirmed` or `cancelled`.
    pub status: String,
    /// Why the order was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub customer: Option<String>,
    pub lines: Vec<Line>,
    pub total: Decimal,
    pub currency: String,
    pub placed_at: DateTime<Utc>,
    /// The checkout of the order; `null` until the checkout has started, a moment after the order.
    pub saga: Option<SagaView>,
}

/// The answer to `GET /returns/{id}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReturnView {
    pub return_id: String,
    /// `opened` or `completed`.
    pub status: String,
    pub customer: Option<String>,
    pub lines: Vec<Line>,
    pub total: Decimal,
    pub currency: String,
    pub opened_at: DateTime<Utc>,
    pub saga: Option<SagaView>,
}

/// The answer to `GET /supplies/{id}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SupplyView {
    pub supply_id: String,
    #[serde(flatten)]
    pub supply: NewSupply,
    pub saga: Option<SagaView>,
}

/// The answer to `GET /closings/{id}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClosingView {
    pub closing_id: String,
    /// The totals; `null` until every service has counted.
    pub books: Option<ShopBooks>,
    /// The store of the order service's events, without its password.
    pub store: String,
    /// The bus between the services.
    pub bus: String,
    pub saga: Option<SagaView>,
}

/// The state of a saga, and its history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SagaView {
    pub saga: String,
    /// `running`, `compensating`, `completed`, `compensated` or `stuck`.
    pub status: String,
    /// The current step.
    pub step: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    pub timeline: Vec<Moment>,
}

/// An event in the history of a saga.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moment {
    pub at: DateTime<Utc>,
    /// `saga.started`, `saga.replied`, `saga.timed`, `saga.operated` or `saga.migrated`.
    pub event: String,
    /// The step that the event is about.
    pub step: String,
    /// The outcome of a reply: `done`, `refused`, `failed` or `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Why the step was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The status of the saga after the event.
    pub status: String,
}

impl SagaView {
    /// Returns whether the saga has ended or waits for an operator.
    pub fn has_settled(&self) -> bool {
        self.ended_at.is_some() || self.is_stuck()
    }

    /// Returns whether the saga is waiting for an operator.
    pub fn is_stuck(&self) -> bool {
        self.status == STUCK
    }
}
