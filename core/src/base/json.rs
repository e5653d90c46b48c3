//! Conversion of values to JSON text and back without loss.
//!
//! serde_json writes a number that is not finite as `null`, and reads an integer beyond 64 bits into a [`Value`] as the
//! nearest `f64`. In neither case does serde_json report an error. This module refuses numbers that are not finite, and
//! keeps integers beyond 64 bits exact. (The feature `arbitrary_precision` of serde_json would keep such integers exact
//! too, but would break numbers in flattened and untagged types throughout the program.)

use std::{collections::HashSet, fmt, io, ops::Range};

use serde::{
    Serialize,
    de::DeserializeOwned,
    ser::{self, Serializer},
};
use serde_json::{
    Error, Value,
    ser::{CompactFormatter, Formatter, PrettyFormatter},
};

/// The number of digits of the shortest integer that does not fit into 64 bits: -9,223,372,036,854,775,809.
const BIG_DIGITS_MIN: usize = 19;

/// Serializes a value as JSON text.
///
/// # Errors
/// Fails if serde_json refuses the value, or if a number is NaN or infinite. In the latter case, the error names the
/// field.
pub fn to_json<T: Serialize + ?Sized>(value: &T) -> Result<String, Error> {
    let text = serde_json::to_string(value)?;
    // A number that is not finite becomes `null` in the text, so most values need no further check.
    if text.contains("null") {
        check_finite(value)?;
    }
    Ok(text)
}

/// Like [`to_json`], for a value that is later read as the same type. If the text contains an integer beyond 64 bits,
/// this function also parses the text and fails if the integer does not survive. Serde loses such integers within
/// flattened, untagged and internally tagged types.
pub fn to_json_exact<T: Serialize + DeserializeOwned>(value: &T) -> Result<String, Error> {
    let text = to_json(value)?;
    check_read_back(&text, || to_json(&serde_json::from_str::<T>(&text)?))?;
    Ok(text)
}

/// Converts a value to a [`Value`]. Fails in the same cases as [`to_json`].
pub(crate) fn to_value<T: Serialize>(value: &T) -> Result<Value, Error> {
    check_finite(value)?;
    serde_json::to_value(value)
}

/// Refuses a JSON string with integers beyond 64 bits that do not survive a round trip. `again` parses the string and
/// serializes the result again.
#[doc(hidden)]
pub fn check_read_back<E: fmt::Display>(text: &str, again: impl FnOnce() -> Result<String, E>) -> Result<(), Error> {
    if !may_have_big_integers(text) {
        return Ok(());
    }
    // A map may have its entries in another order after the round trip.
    let sorted = |text: &str| {
        let mut integers: Vec<_> = big_integers(text).map(|range| text[range].to_owned()).collect();
        integers.sort_unstable();
        integers
    };
    let wanted = sorted(text);
    if wanted.is_empty() {
        return Ok(());
    }
    let reason = match again() {
        Ok(again) if sorted(&again) == wanted => return Ok(()),
        Ok(_) => "the number changes when the value is read".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(ser::Error::custom(format!(
        "an integer beyond 64 bits would not be read back ({reason}); write it as text, or outside of flattened and \
         untagged types"
    )))
}

fn check_finite<T: Serialize + ?Sized>(value: &T) -> Result<(), Error> {
    value.serialize(Finite).map_err(|NotFinite { path, reason }| {
        let place = if path.is_empty() { String::new() } else { format!("{}: ", path.trim_start_matches('.')) };
        ser::Error::custom(format!("{place}{reason}"))
    })
}

/// JSON text that was parsed into a [`Value`], which upcasters can change. The struct also holds the data that is
/// needed to restore integers beyond 64 bits afterwards.
#[doc(hidden)]
#[derive(Debug)]
pub struct Upcast {
    /// The value. Each integer beyond 64 bits is replaced by a stand-in, which is a distinct `f64` near the integer.
    pub value: Value,
    stand_ins: Vec<(f64, String)>,
}

impl Upcast {
    /// Parses the text.
    pub fn read(text: &str) -> Result<Self, Error> {
        let mut stand_ins = Vec::new();
        if !may_have_big_integers(text) {
            return Ok(Self { value: serde_json::from_str(text)?, stand_ins });
        }
        // A stand-in must differ from every other number in the text. Otherwise, that number would be restored as the
        // integer too.
        let floats = numbers(text).filter(|range| !is_integer(&text[range.clone()]));
        let mut taken: HashSet<u64> = floats.filter_map(|range| text[range].parse().ok().map(f64::to_bits)).collect();
        let mut changed = String::with_capacity(text.len());
        let mut done = 0;
        for range in big_integers(text) {
            let digits = &text[range.clone()];
            let known = stand_ins.iter().find(|(_, known)| known == digits).map(|(stand_in, _)| *stand_in);
            let stand_in = match (known, digits.parse::<f64>()) {
                (Some(known), _) => known,
                (None, Ok(mut near)) => {
                    while !taken.insert(near.to_bits()) {
                        near = f64::from_bits(near.to_bits() + 1);
                    }
                    stand_ins.push((near, digits.to_owned()));
                    near
                }
                // The number is too large for any number type. The parser will report the error.
                (None, Err(_)) => continue,
            };
            changed += &text[done..range.start];
            changed += &format!("{stand_in:e}");
            done = range.end;
        }
        changed += &text[done..];
        Ok(Self { value: serde_json::from_str(&changed)?, stand_ins })
    }

    /// Converts the value, after all upcasters, to the type `T`.
    pub fn finish<T: DeserializeOwned>(self) -> Result<T, Error> {
        let unread = match T::deserialize(&self.value) {
            _ if !self.stand_ins.is_empty() => None,
            Ok(read) => return Ok(read),
            Err(error) => Some(error),
        };
        // Some types, such as `RawValue`, can only be read from text, so the value is written as text and read again.
        // If both attempts fail, the first error is returned: users never see this text, so an error that names a
        // position in the text would not help them.
        serde_json::from_slice(&self.written(CompactFormatter)?).map_err(|error| unread.unwrap_or(error))
    }

    fn written<F: Formatter>(&self, form: F) -> Result<Vec<u8>, Error> {
        let mut text = Vec::new();
        let formatter = WithIntegers { stand_ins: &self.stand_ins, form };
        self.value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))?;
        Ok(text)
    }
}

/// Returns the JSON text in a readable layout, with every number unchanged.
pub fn pretty(text: &str) -> Result<String, Error> {
    let laid_out = Upcast::read(text)?.written(PrettyFormatter::new())?;
    String::from_utf8(laid_out).map_err(ser::Error::custom)
}

/// A formatter that writes integers in place of their stand-ins.
struct WithIntegers<'a, F> {
    stand_ins: &'a [(f64, String)],
    form: F,
}

macro_rules! as_in_form {
    ($($name:ident($($argument:ident: $type:ty)?),)*) => {
        $(fn $name<W: io::Write + ?Sized>(&mut self, writer: &mut W $(, $argument: $type)?) -> io::Result<()> {
            self.form.$name(writer $(, $argument)?)
        })*
    };
}

impl<F: Formatter> Formatter for WithIntegers<'_, F> {
    fn write_f64<W: io::Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        match self.stand_ins.iter().find(|(stand_in, _)| stand_in.to_bits() == value.to_bits()) {
            Some((_, digits)) => writer.write_all(digits.as_bytes()),
            None => self.form.write_f64(writer, value),
        }
    }

    as_in_form!(
        begin_array(),
        end_array(),
        begin_array_value(first: bool),
        end_array_value(),
        begin_object(),
        end_object(),
        begin_object_key(first: bool),
        end_object_key(),
        begin_object_value(),
        end_object_value(),
    );
}

/// Returns whether the text may contain an integer beyond 64 bits. Such an integer has at least 19 digits, so the
/// search examines only every 19th byte and the digits around it.
fn may_have_big_integers(text: &str) -> bool {
    let bytes = text.as_bytes();
    let digits = |bytes: &mut dyn Iterator<Item = &u8>| bytes.take_while(|byte| byte.is_ascii_digit()).count();
    (BIG_DIGITS_MIN - 1..bytes.len()).step_by(BIG_DIGITS_MIN).any(|at| {
        digits(&mut bytes[at..].iter()) > 0
            && digits(&mut bytes[at..].iter()) + digits(&mut bytes[..at].iter().rev()) >= BIG_DIGITS_MIN
    })
}

/// Returns the integers in valid JSON text that fit into 128 bits but not into 64.
fn big_integers(text: &str) -> impl Iterator<Item = Range<usize>> + '_ {
    numbers(text).filter(|range| {
        let number = &text[range.clone()];
        let fits_64 = number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok();
        is_integer(number) && !fits_64 && (number.parse::<i128>().is_ok() || number.parse::<u128>().is_ok())
    })
}

fn is_integer(number: &str) -> bool {
    !number.contains(['.', 'e', 'E'])
}

/// Returns the numbers in valid JSON text.
fn numbers(text: &str) -> impl Iterator<Item = Range<usize>> + '_ {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        while let Some(byte) = bytes.get(at) {
            let start = at;
            at += 1;
            match byte {
                b'"' => {
                    while let Some(byte) = bytes.get(at).filter(|byte| **byte != b'"') {
                        at += if *byte == b'\\' { 2 } else { 1 };
                    }
                    at += 1;
                }
                b'-' | b'0'..=b'9' => {
                    let goes_on = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
                    at += bytes[at..].iter().take_while(goes_on).count();
                    return Some(start..at);
                }
                _ => {}
            }
        }
        None
    })
}

/// A serializer that produces no output, and fails if the value contains a number that is not finite.
#[derive(Clone, Copy)]
struct Finite;

/// The state while the parts of a value are examined. For a sequence, the number counts the elements examined so far.
struct Parts(usize);

#[derive(Debug)]
struct NotFinite {
    path: String,
    reason: String,
}

impl NotFinite {
    fn within(self, part: impl fmt::Display) -> Self {
        Self { path: format!("{part}{}", self.path), ..self }
    }
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for NotFinite {}

impl ser::Error for NotFinite {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self { path: String::new(), reason: reason.to_string() }
    }
}

type Looked = Result<(), NotFinite>;

macro_rules! finite {
    ($($name:ident: $type:ty),*) => {
        $(fn $name(self, _: $type) -> Looked {
            Ok(())
        })*
    };
}

macro_rules! parts {
    ($($name:ident($($argument:ty),*);)*) => {
        $(fn $name(self, $(_: $argument),*) -> Result<Parts, NotFinite> {
            Ok(Parts(0))
        })*
    };
}

impl Serializer for Finite {
    type Ok = ();
    type Error = NotFinite;
    type SerializeSeq = Parts;
    type SerializeTuple = Parts;
    type SerializeTupleStruct = Parts;
    type SerializeTupleVariant = Parts;
    type SerializeMap = Parts;
    type SerializeStruct = Parts;
    type SerializeStructVariant = Parts;

    finite!(
        serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_i128: i128, serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64,
        serialize_u128: u128, serialize_char: char, serialize_str: &str, serialize_bytes: &[u8],
        serialize_unit_struct: &'static str
    );
    parts!(
        serialize_seq(Option<usize>);
        serialize_tuple(usize);
        serialize_tuple_struct(&'static str, usize);
        serialize_tuple_variant(&'static str, u32, &'static str, usize);
        serialize_map(Option<usize>);
        serialize_struct(&'static str, usize);
        serialize_struct_variant(&'static str, u32, &'static str, usize);
    );

    fn serialize_f32(self, value: f32) -> Looked {
        self.serialize_f64(f64::from(value))
    }

    fn serialize_f64(self, value: f64) -> Looked {
        if value.is_finite() { Ok(()) } else { Err(ser::Error::custom(format!("JSON has no number {value}"))) }
    }

    fn serialize_none(self) -> Looked {
        Ok(())
    }

    fn serialize_unit(self) -> Looked {
        Ok(())
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Looked {
        value.serialize(self)
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Looked {
        Ok(())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Looked {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Looked {
        value.serialize(self)
    }
}

macro_rules! elements {
    ($($port:ident::$element:ident),*) => {
        $(impl ser::$port for Parts {
            type Ok = ();
            type Error = NotFinite;

            fn $element<T: Serialize + ?Sized>(&mut self, value: &T) -> Looked {
                self.0 += 1;
                value.serialize(Finite).map_err(|error| error.within(format_args!("[{}]", self.0 - 1)))
            }

            fn end(self) -> Looked {
                Ok(())
            }
        })*
    };
}
elements!(
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field
);

macro_rules! fields {
    ($($port:ident),*) => {
        $(impl ser::$port for Parts {
            type Ok = ();
            type Error = NotFinite;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Looked {
                value.serialize(Finite).map_err(|error| error.within(format_args!(".{name}")))
            }

            fn end(self) -> Looked {
                Ok(())
            }
        })*
    };
}
fields!(SerializeStruct, SerializeStructVariant);

impl ser::SerializeMap for Parts {
    type Ok = ();
    type Error = NotFinite;

    // Keys are text, because serde_json has already refused any other key.
    fn serialize_key<T: Serialize + ?Sized>(&mut self, _: &T) -> Looked {
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Looked {
        value.serialize(Finite)
    }

    fn serialize_entry<K: Serialize + ?Sized, T: Serialize + ?Sized>(&mut self, key: &K, value: &T) -> Looked {
        value.serialize(Finite).map_err(|error| {
            let key = serde_json::to_string(key).unwrap_or_default();
            error.within(format_args!("[{key}]"))
        })
    }

    fn end(self) -> Looked {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn big_integers_are_found_only_outside_of_strings() {
        let text = r#"{"a":18446744073709551615,"b":18446744073709551616,"c":"18446744073709551616",
            "d\"99999999999999999999":[-9223372036854775808,-9223372036854775809],"e":18446744073709551616.5,
            "f":18446744073709551616e3,"g":340282366920938463463374607431768211455,
            "h":340282366920938463463374607431768211456}"#;
        let found: Vec<_> = big_integers(text).map(|range| &text[range]).collect();
        assert_eq!(found, ["18446744073709551616", "-9223372036854775809", "340282366920938463463374607431768211455"]);
        for at in 0..60 {
            let text = format!("[{}{}]", " ".repeat(at), "9".repeat(BIG_DIGITS_MIN));
            assert!(may_have_big_integers(&text), "{text}");
            assert!(!may_have_big_integers(&text.replacen('9', "", 1)), "{text}");
        }
    }

    #[test]
    fn upcasters_change_values_next_to_a_big_integer() {
        // The text contains two integers with the same nearest `f64`, and also that `f64` itself.
        let text = r#"{"a":1000000000000000000000000,"b":1000000000000000000000001,"c":1e24,"d":[-170141183460469231731687303715884105728]}"#;
        let mut upcast = Upcast::read(text).unwrap();
        upcast.value["e"] = upcast.value["a"].take();
        #[derive(serde::Deserialize)]
        struct Read {
            b: u128,
            c: f64,
            d: Vec<i128>,
            e: u128,
        }
        let Read { b, c, d, e } = upcast.finish().unwrap();
        assert_eq!((b, e, c), (10_u128.pow(24) + 1, 10_u128.pow(24), 1e24));
        assert_eq!(d, [i128::MIN]);
    }

    #[test]
    fn display_shows_the_exact_numbers() {
        let text = r#"{"b":[18446744073709551616,{}],"a":0.1}"#;
        let shown = "{\n  \"a\": 0.1,\n  \"b\": [\n    18446744073709551616,\n    {}\n  ]\n}";
        assert_eq!(pretty(text).unwrap(), shown);
        assert!(pretty("{").is_err());
    }

    #[test]
    fn saga_input_must_be_finite() {
        assert_eq!(to_value(&Some(1.5)).unwrap(), serde_json::json!(1.5));
        assert!(to_value(&Some(f64::NAN)).is_err());
        assert!(to_value(&std::collections::BTreeMap::from([("k", f32::INFINITY)])).is_err());
        assert!(to_value(&(u128::from(u64::MAX) + 1)).is_err(), "a value cannot hold it, and says so");
    }

    #[test]
    fn error_names_the_place_of_a_number_that_is_not_finite() {
        #[derive(Serialize)]
        struct Outer {
            none: Option<u8>,
            inner: Vec<std::collections::BTreeMap<String, (u8, f32)>>,
        }
        let value = |number| Outer { none: None, inner: vec![[].into(), [("k".to_owned(), (1, number))].into()] };
        assert!(to_json(&value(1.5)).is_ok());
        let error = to_json(&value(f32::NEG_INFINITY)).unwrap_err().to_string();
        assert_eq!(error, r#"inner[1]["k"][1]: JSON has no number -inf"#);
    }
}
