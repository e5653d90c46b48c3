//! Reads the JSON of a request strictly: an error names the field, the expected value and the value found.

use std::{fmt, marker::PhantomData};

use axum::http::StatusCode;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error, IgnoredAny, MapAccess, Unexpected, Visitor, value::MapAccessDeserializer},
};

use super::problem::Problem;

/// The maximum number of characters in an error. An error quotes the value found, which may be the whole body.
const REASON_CHARS_MAX: usize = 300;

/// Reads a body.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let read = serde_path_to_error::deserialize::<_, T>(&mut json);
    let problem = |status, reason: String| Problem::new(status, format!("{reason:.REASON_CHARS_MAX$}"));
    let not_json =
        |error: serde_json::Error| problem(StatusCode::BAD_REQUEST, format!("the body is not JSON: {error}"));
    match read {
        Ok(value) => json.end().map(|()| value).map_err(not_json),
        Err(error) => {
            // A body with the wrong shape may also contain invalid JSON after the mismatch. In that case the answer
            // reports the invalid JSON.
            let is_json = serde_json::from_slice::<IgnoredAny>(body);
            match is_json {
                Err(error) if !error.is_data() => Err(not_json(error)),
                _ => {
                    let path = error.path().to_string();
                    let at = if path == "." { String::new() } else { format!("{path}: ") };
                    let reason = format!("the body does not have the expected shape: {at}{}", error.into_inner());
                    Err(problem(StatusCode::UNPROCESSABLE_ENTITY, reason))
                }
            }
        }
    }
}

/// A value that must be a JSON object. The derived `Deserialize` of a struct also accepts an array of the field values
/// in order.
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(members))
            }
        }

        deserializer.deserialize_map(Members(PhantomData)).map(Self)
    }
}

/// A whole number within the bounds of `N`. The error names the bounds.
pub fn whole_number<'de, D: Deserializer<'de>, N: TryFrom<i64> + Bounds>(deserializer: D) -> Result<N, D::Error> {
    struct WholeNumber<N>(PhantomData<N>);

    impl<N: TryFrom<i64> + Bounds> Visitor<'_> for WholeNumber<N> {
        type Value = N;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let (least, most) = N::BOUNDS;
            write!(f, "a whole number from {least} to {most}")
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<N, E> {
            N::try_from(number).map_err(|_| E::invalid_value(Unexpected::Signed(number), &self))
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<N, E> {
            let fits = i64::try_from(number).ok().and_then(|number| N::try_from(number).ok());
            fits.ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
        }
    }

    deserializer.deserialize_i64(WholeNumber(PhantomData))
}

/// The minimum and the maximum of a number.
pub trait Bounds {
    const BOUNDS: (i64, i64);
}

impl Bounds for u32 {
    const BOUNDS: (i64, i64) = (0, u32::MAX as i64);
}

impl Bounds for i64 {
    const BOUNDS: (i64, i64) = (i64::MIN, i64::MAX);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::bodies::{NewOrder, NewSupply};

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
        assert_eq!(long.chars().count(), REASON_CHARS_MAX);
    }

    #[test]
    fn invalid_json_is_distinguished_from_wrong_shape() {
        for body in ["", "{", "{]", "{\"lines\": 1", "{\"lines\": []} x", "nul", "\u{feff}{}"] {
            let (status, detail) = detail::<NewOrder>(body);
            assert!(status == 400 && detail.starts_with("the body is not JSON"), "{body}: {status} {detail}");
        }
    }
}
