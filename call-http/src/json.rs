//! Reads the JSON of a request strictly: an error names the field, the expected value and the value found.

use std::{fmt, marker::PhantomData};

use axum::http::StatusCode;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error, IgnoredAny, MapAccess, Unexpected, Visitor, value::MapAccessDeserializer},
};

use crate::problem::Problem;

/// The maximum number of characters in an error. An error quotes the value found, which may be the whole body.
const REASON_CHARS_MAX: usize = 300;

/// Reads a body.
///
/// # Errors
/// A 400 if the body is not JSON, and a 422 if the JSON does not have the expected shape.
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

/// Reads a whole number within the bounds of `N`, for `#[serde(deserialize_with = …)]`. The error names the bounds.
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
    /// The minimum and the maximum.
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

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Parcel {
        #[serde(deserialize_with = "whole_number")]
        pieces: u32,
    }

    fn read_parcel(body: &str) -> Result<u32, (u16, String)> {
        let read = read::<Object<Parcel>>(body.as_bytes());
        read.map(|Object(parcel)| parcel.pieces).map_err(|problem| (problem.status, problem.detail))
    }

    #[test]
    fn wrong_shape_and_invalid_json_have_different_problems() {
        assert_eq!(read_parcel(r#"{"pieces": 3}"#), Ok(3));
        for (body, status, part) in [
            ("[3]", 422, "sequence, expected an object"),
            (r#"{"pieces": -1}"#, 422, "pieces: invalid value: integer `-1`, expected a whole number from 0 to"),
            (r#"{"pieces": 1, "weight": 2}"#, 422, "unknown field `weight`"),
            (r#"{"pieces": 1"#, 400, "the body is not JSON"),
            (r#"{"pieces": 1} x"#, 400, "the body is not JSON"),
        ] {
            let (found, detail) = read_parcel(body).expect_err(body);
            assert!(found == status && detail.contains(part), "{body}: {found} {detail}");
        }
    }
}
