//! Selects events of the log by category, type and payload.

use std::sync::Arc;

use annals::LogQuery;
use clap::Args;
use serde_json_path::JsonPath;

/// A filter for events in the log.
#[derive(Clone, Debug, Args)]
pub(crate) struct EventFilter {
    /// Only events of streams of these categories, such as `order,payment`.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub category: Vec<String>,
    /// Only events of these types, such as `order.placed,order.confirmed`.
    #[arg(long = "type", value_name = "NAME", value_delimiter = ',')]
    pub types: Vec<String>,
    /// Only events whose payload has a match for this JSONPath (RFC 9535). The path can also treat the payload as the
    /// only element of a list, which allows a filter: `$[?@.order_id=="536365"]`.
    #[arg(long = "where", value_name = "JSONPATH", value_parser = path)]
    pub path: Option<JsonPath>,
}

fn path(text: &str) -> Result<JsonPath, String> {
    JsonPath::parse(text).map_err(|error| format!("not a JSONPath such as $[?@.order_id==\"536365\"]: {error}"))
}

impl EventFilter {
    /// Returns the part of the filter that the store itself applies.
    pub fn query(&self) -> LogQuery {
        let names = |names: &[String]| names.iter().map(|name| Arc::from(name.as_str())).collect();
        LogQuery { categories: names(&self.category), types: names(&self.types) }
    }

    /// Returns whether the payload matches the JSONPath.
    pub fn has(&self, payload: &str) -> bool {
        let Some(path) = &self.path else { return true };
        let Ok(payload) = serde_json::from_str::<serde_json::Value>(payload) else { return false };
        !path.query(&payload).is_empty() || !path.query(&serde_json::Value::Array(vec![payload])).is_empty()
    }
}
