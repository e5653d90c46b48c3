//! The enum after parsing and all checks. The macro generates its code from this form.

use std::collections::HashMap;

use syn::{
    Data, DataEnum, DeriveInput, Error, ExprPath, Fields, FieldsNamed, Generics, Ident, LitStr, Result, Variant,
    ext::IdentExt, parse_quote,
};

use crate::{
    attributes::{EnumAttributes, VariantAttributes, field_serde},
    name,
};

/// An enum of events.
pub(crate) struct EventEnum {
    pub(crate) ident: Ident,
    pub(crate) skip_unknown: bool,
    pub(crate) variants: Vec<EventVariant>,
}

/// One type of event.
pub(crate) struct EventVariant {
    pub(crate) ident: Ident,
    /// The stored name.
    pub(crate) name: String,
    pub(crate) version: i32,
    /// The upcasters in order. The first converts version 1 to version 2; the last produces the current version.
    pub(crate) upcasters: Vec<ExprPath>,
    /// The `#[serde(..)]` attributes of the variant.
    pub(crate) serde: Vec<syn::Attribute>,
    /// The fields, with only their `#[serde(..)]` attributes: one unnamed field, any number of named fields, or none
    /// for a unit variant.
    pub(crate) fields: Fields,
}

impl EventEnum {
    pub(crate) fn parse(input: DeriveInput) -> Result<Self> {
        let data = enum_data(&input)?;
        refuse_generics(&input.generics)?;
        let attributes = EnumAttributes::parse(&input.attrs)?;

        let mut variants = Vec::new();
        let mut names = HashMap::new();
        let mut errors = None;
        for variant in &data.variants {
            let parsed = EventVariant::parse(variant, attributes.prefix.as_ref())
                .and_then(|parsed| refuse_duplicate(&mut names, parsed));
            match (parsed, &mut errors) {
                (Ok(parsed), _) => variants.push(parsed),
                (Err(error), None) => errors = Some(error),
                (Err(error), Some(errors)) => errors.combine(error),
            }
        }
        match errors {
            Some(errors) => Err(errors),
            None => Ok(Self { ident: input.ident, skip_unknown: attributes.unknown.is_some(), variants }),
        }
    }
}

impl EventVariant {
    fn parse(variant: &Variant, prefix: Option<&LitStr>) -> Result<Self> {
        let attributes = VariantAttributes::parse(&variant.attrs)?;
        let (version, upcasters) = versions(&variant.ident, &attributes)?;
        Ok(Self {
            ident: variant.ident.clone(),
            name: stored_name(&variant.ident, attributes.name.as_ref(), prefix)?,
            version,
            upcasters,
            serde: attributes.serde,
            fields: stored_fields(variant)?,
        })
    }
}

fn enum_data(input: &DeriveInput) -> Result<&DataEnum> {
    let (keyword, found) = match &input.data {
        Data::Enum(data) => return Ok(data),
        Data::Struct(data) => (data.struct_token.span, "a struct"),
        Data::Union(data) => (data.union_token.span, "a union"),
    };
    Err(Error::new(keyword, format!("`Event` is derived for an enum with one variant per event, not for {found}")))
}

fn refuse_generics(generics: &Generics) -> Result<()> {
    let message = "an `Event` enum cannot be generic: each stored type name stands for one type";
    if !generics.params.is_empty() {
        return Err(Error::new_spanned(generics, message));
    }
    match &generics.where_clause {
        Some(clause) => Err(Error::new_spanned(clause, message)),
        None => Ok(()),
    }
}

fn refuse_duplicate(names: &mut HashMap<String, Ident>, variant: EventVariant) -> Result<EventVariant> {
    match names.insert(variant.name.clone(), variant.ident.clone()) {
        Some(first) => {
            Err(Error::new(variant.ident.span(), format!("`{first}` is already stored as `{}`", variant.name)))
        }
        None => Ok(variant),
    }
}

fn stored_name(variant: &Ident, explicit: Option<&LitStr>, prefix: Option<&LitStr>) -> Result<String> {
    if let Some(explicit) = explicit {
        let stored = explicit.value();
        return match name::check(&stored) {
            Ok(()) => Ok(stored),
            Err(why) => Err(Error::new(explicit.span(), format!("invalid name: {why}"))),
        };
    }
    let kebab = name::kebab_case(&variant.unraw().to_string());
    // The variant's part of the name is first checked without the prefix. With a prefix, the check would not notice
    // that this part does not start with a letter.
    let stored = name::check(&kebab).map(|()| match prefix {
        Some(prefix) => format!("{}.{kebab}", prefix.value()),
        None => kebab,
    });
    stored.and_then(|stored| name::check(&stored).map(|()| stored)).map_err(|why| {
        let hint = "set another with `#[event(name = \"..\")]`";
        Error::new(variant.span(), format!("invalid name: {why}; {hint}"))
    })
}

/// Returns the current version and the upcasters. There is one upcaster fewer than there are versions.
fn versions(variant: &Ident, attributes: &VariantAttributes) -> Result<(i32, Vec<ExprPath>)> {
    let version = match &attributes.version {
        Some(literal) => literal.base10_parse::<i32>()?,
        None => 1,
    };
    if version < 1 {
        let message = format!("schema versions start at 1, not at {version}");
        return Err(Error::new_spanned(&attributes.version, message));
    }
    let upcasters: Vec<ExprPath> = attributes.upcasters.iter().flatten().cloned().collect();
    let needed = version.abs_diff(1) as usize;
    let found = upcasters.len();
    if needed == found {
        return Ok((version, upcasters));
    }
    let plural = if needed == 1 { "" } else { "s" };
    let message = format!(
        "version {version} needs {needed} upcaster{plural}, one for each step from version 1; \
         found {found}, which makes version {}",
        found + 1
    );
    Err(match (&attributes.upcasters, &attributes.version) {
        (Some(upcasters), _) if found > 0 => Error::new_spanned(upcasters, message),
        (_, Some(version)) => Error::new(version.span(), message),
        _ => Error::new(variant.span(), message),
    })
}

fn stored_fields(variant: &Variant) -> Result<Fields> {
    let mut fields = match &variant.fields {
        Fields::Unnamed(fields) if fields.unnamed.len() != 1 => {
            return Err(Error::new_spanned(
                fields,
                format!(
                    "a tuple variant of an event has exactly 1 field, this has {}: \
                     name the fields, so that readers of the stored JSON can distinguish them",
                    fields.unnamed.len()
                ),
            ));
        }
        Fields::Unit => Fields::Named(no_fields()),
        fields => fields.clone(),
    };
    for field in &mut fields {
        field.attrs = field_serde(&field.attrs)?;
    }
    Ok(fields)
}

fn no_fields() -> FieldsNamed {
    parse_quote!({})
}
