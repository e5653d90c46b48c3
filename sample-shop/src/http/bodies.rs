//! The bodies of requests and answers, as JSON.

use annals_http::{
    SagaView,
    json::{Object, whole_number},
};
use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, IntoDeserializer},
};

use crate::{
    card::Card,
    inventory::Change,
    order::{Line, ShopBooks},
};

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

#[cfg(test)]
mod tests {
    use annals_http::json::{Object, read};
    use serde::de::DeserializeOwned;

    use super::*;

    fn detail<T: DeserializeOwned>(body: &str) -> (u16, String) {
        let problem = read::<Object<T>>(body.as_bytes()).map(drop).expect_err(body);
        (problem.status, problem.detail)
    }

    #[test]
    fn wrong_shape_names_field_expectation_and_finding() {
        let line = |line: &str| format!(r#"{{"lines": [{{"sku":"a","quantity":1,"unit_price":"1"}}, {line}]}}"#);
        for (body, parts) in [
            ("[]".to_owned(), &["invalid type: sequence, expected an object"][..]),
            (r#"["x", [], "good"]"#.into(), &["invalid type: sequence, expected an object"]),
            ("1".into(), &["integer `1`, expected an object"]),
            ("null".into(), &["null, expected an object"]),
            (r#"{"lines": {}}"#.into(), &["lines: invalid type: map, expected a sequence"]),
            (r#"{"lines": ["a"]}"#.into(), &["lines[0]: ", "string \"a\", expected an object"]),
            (line(r#"["a", 1, "1"]"#), &["lines[1]: ", "sequence, expected an object"]),
            (line(r#"{"sku": 1}"#), &["lines[1].sku: ", "integer `1`, expected a string"]),
            (
                line(r#"{"sku": "a", "quantity": -1}"#),
                &["lines[1].quantity: ", "`-1`, expected a whole number from 0 to 4294967295"],
            ),
            (
                line(r#"{"sku": "a", "quantity": "1"}"#),
                &["lines[1].quantity: ", "string \"1\", expected a whole number"],
            ),
            (
                line(r#"{"sku": "a", "quantity": 1.5}"#),
                &["lines[1].quantity: ", "floating point `1.5`, expected a whole number"],
            ),
            (
                line(r#"{"sku": "a", "quantity": 1, "unit_price": 2.55}"#),
                &["lines[1].unit_price: ", "`2.55`, expected a string"],
            ),
            (
                line(r#"{"sku": "a", "quantity": 1, "unit_price": "x"}"#),
                &["lines[1].unit_price: ", "\"x\" is not an amount; a valid amount is \"2.55\""],
            ),
            (line(r#"{"sku": "a"}"#), &["lines[1]: ", "missing field `quantity`"]),
            (r#"{"lines": [], "lines": []}"#.into(), &["duplicate field `lines`"]),
            (r#"{"lines": [], "card": 5}"#.into(), &["card: ", "integer `5`, expected a string"]),
            (r#"{"lines": [], "card": "x"}"#.into(), &["card: ", "unknown variant `x`, expected one of `good`"]),
            (r#"{"lines": [], "customer": ["x"]}"#.into(), &["customer: ", "sequence, expected a string"]),
        ] {
            let (status, detail) = detail::<NewOrder>(&body);
            assert_eq!(status, 422, "{body}: {detail}");
            for part in parts {
                assert!(detail.contains(part), "{body}: {detail}");
            }
        }
        for (body, part) in [
            (r#"{"delivered": [], "adjusted": []}"#, "either `delivered` or `adjusted`"),
            ("{}", "either `delivered` or `adjusted`"),
            (r#"{"delivered": 1}"#, "delivered: invalid type: integer `1`, expected a sequence"),
            (r#"{"delivered": [["a", 1]]}"#, "delivered[0]: invalid type: sequence, expected an object"),
            (r#"{"adjusted": [{"sku": "a", "quantity": 1e30}]}"#, "adjusted[0].quantity: "),
            (r#""delivered""#, "expected an object"),
        ] {
            let (status, detail) = detail::<NewSupply>(body);
            assert!(status == 422 && detail.contains(part), "{body}: {status} {detail}");
        }
        let (_, long) = detail::<NewOrder>(&format!(r#"{{"lines": "{}"}}"#, "x".repeat(1_000)));
        assert_eq!(long.chars().count(), 300);
    }

    #[test]
    fn invalid_json_is_distinguished_from_wrong_shape() {
        for body in ["", "{", "{]", "{\"lines\": 1", "{\"lines\": []} x", "nul", "\u{feff}{}"] {
            let (status, detail) = detail::<NewOrder>(body);
            assert!(status == 400 && detail.starts_with("the body is not JSON"), "{body}: {status} {detail}");
        }
    }
}
