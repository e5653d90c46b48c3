//! The code that the macro generates.
//!
//! All generated code is in one anonymous constant. The user's field types and upcasters are also resolved inside this
//! constant. The names of the generated items begin with `__`, so that they cannot collide with the user's names. For
//! the same reason all paths are absolute: the user may have another `Result` in scope.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::{Fields, Ident, ext::IdentExt, spanned::Spanned};

use crate::{
    attributes::path_text,
    event::{EventEnum, EventVariant},
};

/// Generates `impl Event for ..` and the items that it needs.
pub(crate) fn event_impl(event_enum: &EventEnum) -> TokenStream {
    let EventEnum { ident, skip_unknown, variants } = event_enum;
    let names: Vec<_> = variants.iter().map(|v| &v.name).collect();
    let versions: Vec<_> = variants.iter().map(|v| v.version).collect();
    let idents: Vec<_> = variants.iter().map(|v| &v.ident).collect();
    let read_arms = variants.iter().map(read_arm);
    let writer = writer(event_enum);
    let readers = variants.iter().filter_map(reader);
    let read = read_fn();
    let encode = encode_fn();
    let unknown = if *skip_unknown {
        quote!(::std::result::Result::Ok(::std::option::Option::None))
    } else {
        quote! {
            ::std::result::Result::Err(::annals::event::EventError::UnknownType {
                type_name: ::std::borrow::ToOwned::to_owned(type_name),
                expected: <Self as ::annals::event::Event>::TYPES,
            })
        }
    };

    quote! {
        const _: () = {
            #writer
            #(#readers)*
            #read

            #[automatically_derived]
            impl ::annals::event::Event for #ident {
                const TYPES: &'static [::annals::event::EventType] = &[
                    #(::annals::event::EventType { name: #names, version: #versions },)*
                ];

                fn type_name(&self) -> &'static str {
                    match *self {
                        #(Self::#idents { .. } => #names,)*
                    }
                }

                fn schema_version(&self) -> i32 {
                    match *self {
                        #(Self::#idents { .. } => #versions,)*
                    }
                }

                #encode

                fn decode(
                    type_name: &str,
                    schema_version: i32,
                    data: &str,
                ) -> ::std::result::Result<
                    ::std::option::Option<Self>,
                    ::annals::event::EventError,
                > {
                    match type_name {
                        #(#read_arms)*
                        _ => #unknown,
                    }
                }
            }
        };
    }
}

/// Generates the function that writes a value as JSON. If serde might not restore a number in the value, the function
/// also reads the value back.
fn encode_fn() -> TokenStream {
    quote! {
        fn encode(
            &self,
        ) -> ::std::result::Result<::std::string::String, ::annals::event::EventError> {
            let type_name = ::annals::event::Event::type_name(self);
            let unencodable = |error: ::annals::serde_json::Error| {
                ::annals::event::EventError::Unencodable {
                    type_name: ::std::borrow::ToOwned::to_owned(type_name),
                    reason: ::std::string::ToString::to_string(&error),
                }
            };
            let text = ::annals::json::to_json(&__Written(self)).map_err(unencodable)?;
            let again = || {
                let version = ::annals::event::Event::schema_version(self);
                match <Self as ::annals::event::Event>::decode(type_name, version, &text) {
                    ::std::result::Result::Ok(::std::option::Option::Some(read)) => {
                        ::annals::json::to_json(&__Written(&read))
                            .map_err(|error| ::std::string::ToString::to_string(&error))
                    }
                    ::std::result::Result::Ok(::std::option::Option::None) => {
                        ::std::result::Result::Ok(::std::string::String::new())
                    }
                    ::std::result::Result::Err(error) => {
                        ::std::result::Result::Err(::std::string::ToString::to_string(&error))
                    }
                }
            };
            ::annals::json::check_read_back(&text, again).map_err(unencodable)?;
            ::std::result::Result::Ok(text)
        }
    }
}

/// Generates the type that serializes the fields of any variant without copying them. The type mirrors the enum with
/// serde's "remote derive". The generated type borrows the fields from the original but keeps the types of the fields,
/// so that `skip_serializing_if` and `serialize_with` work as usual. A struct of references would break both
/// attributes. `untagged` makes the JSON contain only the fields.
fn writer(event_enum: &EventEnum) -> TokenStream {
    let ident = &event_enum.ident;
    let remote = ident.to_string();
    let variants = event_enum.variants.iter().map(|variant| {
        let EventVariant { ident, serde, fields, .. } = variant;
        quote!(#(#serde)* #ident #fields)
    });
    quote! {
        #[derive(::annals::serde::Serialize)]
        #[serde(crate = "::annals::serde", remote = #remote, untagged)]
        enum __Fields {
            #(#variants,)*
        }

        struct __Written<'a>(&'a #ident);

        impl ::annals::serde::Serialize for __Written<'_> {
            fn serialize<S: ::annals::serde::Serializer>(
                &self,
                serializer: S,
            ) -> ::std::result::Result<S::Ok, S::Error> {
                __Fields::serialize(self.0, serializer)
            }
        }
    }
}

fn reader_ident(variant: &EventVariant) -> Ident {
    format_ident!("__Read{}", variant.ident.unraw())
}

/// Generates the struct into which the fields of one variant are deserialized, if the variant has fields.
fn reader(variant: &EventVariant) -> Option<TokenStream> {
    let EventVariant { name, serde, fields, .. } = variant;
    if fields.is_empty() {
        return None;
    }
    let reader = reader_ident(variant);
    let expecting = format!("the fields of {name}");
    let semicolon = matches!(fields, Fields::Unnamed(_)).then(|| quote!(;));
    Some(quote! {
        #[derive(::annals::serde::Deserialize)]
        #[serde(crate = "::annals::serde", expecting = #expecting)]
        #(#serde)*
        struct #reader #fields #semicolon
    })
}

/// Generates the arm of `decode` for one variant.
fn read_arm(variant: &EventVariant) -> TokenStream {
    let EventVariant { ident, name, version, fields, .. } = variant;
    // For a struct without fields, serde would also accept an array.
    let reader = if fields.is_empty() {
        quote!(::annals::serde_json::Map<::std::string::String, ::annals::serde_json::Value>)
    } else {
        reader_ident(variant).into_token_stream()
    };
    let members: Vec<_> = fields.members().collect();
    let steps = variant.upcasters.iter().map(|upcaster| {
        let shown = path_text(&upcaster.path);
        // With this span, the compiler reports an upcaster of the wrong type where the attribute names the upcaster,
        // not at `derive(Event)`.
        let span = Span::mixed_site().located_at(upcaster.span());
        quote_spanned! {span=>
            (#shown, |value| {
                let upcast: ::std::result::Result<::annals::serde_json::Value, _> = #upcaster(value);
                upcast.map_err(|error| ::std::string::ToString::to_string(&error))
            })
        }
    });
    quote! {
        #name => {
            let _read: #reader = __read(#name, #version, &[#(#steps),*], schema_version, data)?;
            ::std::result::Result::Ok(::std::option::Option::Some(
                Self::#ident { #(#members: _read.#members),* }
            ))
        }
    }
}

/// Generates the function that all arms of `decode` share.
fn read_fn() -> TokenStream {
    quote! {
        fn __read<T: ::annals::serde::de::DeserializeOwned>(
            type_name: &str,
            known: i32,
            upcasters: &[(
                &str,
                fn(::annals::serde_json::Value) -> ::std::result::Result<
                    ::annals::serde_json::Value,
                    ::std::string::String,
                >,
            )],
            schema_version: i32,
            data: &str,
        ) -> ::std::result::Result<T, ::annals::event::EventError> {
            let type_name = || ::std::borrow::ToOwned::to_owned(type_name);
            let undecodable = |reason| ::annals::event::EventError::Undecodable {
                type_name: type_name(),
                version: schema_version,
                reason,
            };
            let mismatch = |error: ::annals::serde_json::Error| {
                undecodable(::std::string::ToString::to_string(&error))
            };
            if schema_version < 1 || schema_version > known {
                return ::std::result::Result::Err(::annals::event::EventError::FutureVersion {
                    type_name: type_name(),
                    version: schema_version,
                    known,
                });
            }
            if schema_version == known {
                return ::annals::serde_json::from_str(data).map_err(mismatch);
            }
            let mut upcasting = ::annals::json::Upcast::read(data).map_err(mismatch)?;
            for (from, (name, upcast)) in (1..known).zip(upcasters) {
                if from >= schema_version {
                    upcasting.value = upcast(::std::mem::take(&mut upcasting.value)).map_err(|reason| {
                        let to = from + 1;
                        undecodable(::std::format!("upcaster {name}, from {from} to {to}: {reason}"))
                    })?;
                }
            }
            upcasting
                .finish()
                .map_err(|error| undecodable(::std::format!("after the upcasters: {error}")))
        }
    }
}
