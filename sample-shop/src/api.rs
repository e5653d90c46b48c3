//! What the order service's HTTP interface takes and gives, as JSON. Both sides use it: `serve`, and `run --http`.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::{books::Books, card::Card, order::Line, supply::Change};

/// The header that names what is handed in: the same key is the same order. Becomes its id.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The header of an answer to what was handed in before.
pub const REPLAYED: &str = "idempotency-replayed";
/// The status of a saga that waits for an operator.
pub const STUCK: &str = "stuck";

/// The body of `POST /orders`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewOrder {
    /// Who; `null` is a guest.
    #[serde(default)]
    pub customer: Option<String>,
    /// What, and at which price.
    #[serde(deserialize_with = "lines")]
    pub lines: Vec<Line>,
    /// A test card; a good one by default.
    #[serde(default, skip_serializing_if = "Card::is_good")]
    pub card: Card,
}

/// The body of `POST /returns`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewReturn {
    /// Who; `null` is a guest.
    #[serde(default)]
    pub customer: Option<String>,
    /// What comes back, and what is paid back for it.
    #[serde(deserialize_with = "lines")]
    pub lines: Vec<Line>,
}

/// A line as it is asked for. What is stored is read with fields that later builds add; here they are mistakes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedLine {
    sku: String,
    quantity: u32,
    unit_price: String,
}

fn lines<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Line>, D::Error> {
    let lines =
        Vec::<AskedLine>::deserialize(deserializer)?.into_iter().map(|AskedLine { sku, quantity, unit_price }| {
            let digits = unit_price.strip_prefix('-').unwrap_or(&unit_price);
            let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
            let parsed = unit_price.parse().ok().filter(|_| is_plain);
            let wrong = || D::Error::custom(format!("the price {unit_price:.40?} is no amount, such as \"2.55\""));
            Ok(Line { sku, quantity, unit_price: parsed.ok_or_else(wrong)? })
        });
    lines.collect()
}

/// The body of `POST /supplies`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NewSupply {
    /// Goods came in.
    Delivered(Vec<Change>),
    /// Somebody counted.
    Adjusted(Vec<Change>),
}

/// What `GET /orders/{id}` gives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrderView {
    pub order_id: String,
    /// `placed`, `confirmed` or `cancelled`.
    pub status: String,
    /// Why it was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub customer: Option<String>,
    pub lines: Vec<Line>,
    pub total: Decimal,
    pub currency: String,
    pub placed_at: DateTime<Utc>,
    /// Its checkout; `null` until it starts, which is a moment.
    pub saga: Option<SagaView>,
}

/// What `GET /returns/{id}` gives.
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

/// What `GET /supplies/{id}` gives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SupplyView {
    pub supply_id: String,
    #[serde(flatten)]
    pub supply: NewSupply,
    pub saga: Option<SagaView>,
}

/// What `GET /closings/{id}` gives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClosingView {
    pub closing_id: String,
    /// `null` until every service has counted.
    pub books: Option<Books>,
    /// Where the order service keeps its events; no password.
    pub store: String,
    /// How the services talk.
    pub bus: String,
    pub saga: Option<SagaView>,
}

/// How far a saga is, and how it came there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SagaView {
    pub saga: String,
    /// `running`, `compensating`, `completed`, `compensated` or `stuck`.
    pub status: String,
    /// Where it is.
    pub step: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    pub timeline: Vec<Moment>,
}

/// Something that happened to a saga.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moment {
    pub at: DateTime<Utc>,
    /// `saga.started`, `saga.replied`, `saga.timed`, `saga.operated` or `saga.migrated`.
    pub event: String,
    /// The step that it was about.
    pub step: String,
    /// Of a reply: `done`, `refused`, `failed` or `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Why it was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the saga was afterwards.
    pub status: String,
}

impl SagaView {
    /// Whether nothing more will happen by itself.
    pub fn has_settled(&self) -> bool {
        self.ended_at.is_some() || self.is_stuck()
    }

    /// Whether it waits for an operator.
    pub fn is_stuck(&self) -> bool {
        self.status == STUCK
    }
}
