//! Parses the attributes `#[event(..)]` and `#[serde(..)]`.

use syn::{
    Attribute, Error, ExprPath, LitInt, LitStr, Meta, Path, Result, Token, meta::ParseNestedMeta, parenthesized,
    punctuated::Punctuated,
};

use crate::name;

/// `#[event(..)]` on the enum.
#[derive(Default)]
pub(crate) struct EnumAttributes {
    pub(crate) prefix: Option<LitStr>,
    pub(crate) unknown: Option<LitStr>,
}

impl EnumAttributes {
    pub(crate) fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut found = Self::default();
        for attribute in attributes.iter().filter(|a| a.path().is_ident("event")) {
            attribute.parse_nested_meta(|meta| match key(&meta).as_str() {
                "prefix" => once(&mut found.prefix, &meta, |meta| meta.value()?.parse()),
                "unknown" => once(&mut found.unknown, &meta, |meta| meta.value()?.parse()),
                _ => Err(unknown_key(&meta, "the enum", "`prefix` and `unknown`")),
            })?;
        }
        found.check()?;
        refuse_serde(attributes, "the enum", &[])?;
        Ok(found)
    }

    fn check(&self) -> Result<()> {
        if let Some(prefix) = &self.prefix {
            let text = prefix.value();
            name::check(&text).map_err(|why| Error::new(prefix.span(), format!("invalid prefix: {why}")))?;
            if text.ends_with('.') {
                let why = "invalid prefix: leave the last `.` out, the macro adds it";
                return Err(Error::new(prefix.span(), why));
            }
        }
        match &self.unknown {
            Some(unknown) if unknown.value() != "skip" => Err(Error::new(
                unknown.span(),
                "expected `unknown = \"skip\"`; without `unknown`, an unknown type is an error",
            )),
            _ => Ok(()),
        }
    }
}

/// `#[event(..)]` and `#[serde(..)]` on a variant.
#[derive(Default)]
pub(crate) struct VariantAttributes {
    pub(crate) name: Option<LitStr>,
    pub(crate) version: Option<LitInt>,
    pub(crate) upcasters: Option<Punctuated<ExprPath, Token![,]>>,
    pub(crate) serde: Vec<Attribute>,
}

impl VariantAttributes {
    pub(crate) fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut found = Self::default();
        for attribute in attributes.iter().filter(|a| a.path().is_ident("event")) {
            attribute.parse_nested_meta(|meta| match key(&meta).as_str() {
                "name" => once(&mut found.name, &meta, |meta| meta.value()?.parse()),
                "version" => once(&mut found.version, &meta, |meta| meta.value()?.parse()),
                "upcasters" => once(&mut found.upcasters, &meta, |meta| {
                    let paths;
                    parenthesized!(paths in meta.input);
                    Punctuated::parse_terminated(&paths)
                }),
                _ => {
                    let known = "`name`, `version` and `upcasters`";
                    Err(unknown_key(&meta, "a variant", known))
                }
            })?;
        }
        refuse_serde(attributes, "a variant", &["rename_all"])?;
        found.serde = serde(attributes).cloned().collect();
        Ok(found)
    }
}

/// Returns the `#[serde(..)]` attributes of a field, which are all passed on to serde.
pub(crate) fn field_serde(attributes: &[Attribute]) -> Result<Vec<Attribute>> {
    match attributes.iter().find(|a| a.path().is_ident("event")) {
        Some(event) => {
            Err(Error::new_spanned(event, "`#[event(..)]` belongs on the enum or a variant, not on a field"))
        }
        None => Ok(serde(attributes).cloned().collect()),
    }
}

fn serde(attributes: &[Attribute]) -> impl Iterator<Item = &Attribute> {
    attributes.iter().filter(|a| a.path().is_ident("serde"))
}

/// Refuses serde attributes that would silently have no effect. An event is stored under its own name with its fields,
/// so serde's attributes that name or tag the variants of an enum do not apply.
fn refuse_serde(attributes: &[Attribute], place: &str, allowed: &[&str]) -> Result<()> {
    for attribute in serde(attributes) {
        let metas = attribute.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)?;
        for meta in metas {
            if !allowed.iter().any(|key| meta.path().is_ident(key)) {
                let key = path_text(meta.path());
                let why = format!(
                    "`#[serde({key})]` on {place} has no effect on events: put it on a field, or choose the stored \
                     name with `#[event(..)]`; of serde, a variant takes `rename_all` only"
                );
                return Err(Error::new_spanned(meta, why));
            }
        }
    }
    Ok(())
}

fn key(meta: &ParseNestedMeta<'_>) -> String {
    meta.path.get_ident().map(ToString::to_string).unwrap_or_default()
}

/// Returns a path as people write it, without generic arguments.
pub(crate) fn path_text(path: &Path) -> String {
    let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    segments.join("::")
}

/// Parses a value and puts it into the slot. Fails if the slot already has a value.
fn once<T>(
    slot: &mut Option<T>,
    meta: &ParseNestedMeta<'_>,
    parse: impl FnOnce(&ParseNestedMeta<'_>) -> Result<T>,
) -> Result<()> {
    match slot.replace(parse(meta)?) {
        Some(_) => Err(meta.error(format!("`{}` is given twice", key(meta)))),
        None => Ok(()),
    }
}

fn unknown_key(meta: &ParseNestedMeta<'_>, place: &str, known: &str) -> Error {
    let path = path_text(&meta.path);
    meta.error(format!("unknown key `{path}`: `#[event(..)]` on {place} knows {known}"))
}
