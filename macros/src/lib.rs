//! Derive macros of annals. Use them through the `annals` crate, which re-exports them.

#![warn(missing_debug_implementations)]

mod attributes;
mod event;
mod expand;
mod name;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Implements `annals::Event` for an enum: each variant is one stored event type.
///
/// ```text
/// #[derive(Event, Clone, Debug, PartialEq)]
/// #[event(prefix = "order")]
/// enum OrderEvent {
///     #[event(version = 3, upcasters(add_currency, split_name))]
///     Placed { order_id: String, currency: String },
///     #[event(name = "order.confirmed-by-hand")]
///     Confirmed { order_id: String },
///     Imported(ImportedOrder),
///     Closed,
/// }
/// ```
///
/// # On the enum
///
/// - `prefix = "order"`: a variant is stored as the prefix, a dot and the variant's name in kebab-case
///   (`order.placed`). Without a prefix, the variant is stored as the kebab-case name alone.
/// - `unknown = "skip"`: a stored type that this enum does not know decodes to `Ok(None)`. Without `unknown`, decoding
///   fails with `EventError::UnknownType`.
///
/// # On a variant
///
/// - `name = "order.placed"`: the whole stored name; the prefix is not added. If events of a variant are already
///   stored, set this attribute when you rename the variant.
/// - `version = 3`: the schema version that is written. The default is 1.
/// - `upcasters(one_to_two, two_to_three)`: one function per step to the current version, each of type
///   `fn(serde_json::Value) -> Result<serde_json::Value, impl Display>`. Events of the current version are decoded
///   directly, without an upcaster.
///
/// A name starts with a lowercase letter, continues with lowercase letters, digits, `.`, `-` and `_`, and has at most
/// 100 bytes.
///
/// # Stored form
///
/// - `Placed { .. }`: the JSON object of its fields. `#[serde(..)]` on a field and `#[serde(rename_all = "..")]` on the
///   variant work as they do in serde. The types of the fields must implement `Serialize` and `Deserialize`; the enum
///   itself need not.
/// - `Imported(ImportedOrder)`: the JSON of the inner value.
/// - `Closed`: `{}`. When the event is read, any JSON object is accepted.
#[proc_macro_derive(Event, attributes(event, serde))]
pub fn derive_event(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    event::EventEnum::parse(input)
        .map(|event_enum| expand::event_impl(&event_enum))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
