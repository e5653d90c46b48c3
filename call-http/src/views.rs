//! The views of read models over HTTP.

use std::time::Duration;

use annals::{Position, ReadModel, StoreError, Views, WaitError};
use axum::{
    Router,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{ToSchema, openapi::path::HttpMethod};
use uuid::Uuid;

use crate::{
    api::{Api, Described, ETAG, path_id, query, request_header},
    conditions::{quoted, with_tag},
    problem::{Problem, without_files},
    request::{Id, bad, id, seconds},
};

/// The number of views in a page, unless the request has `?limit=`.
const PAGE: usize = 100;
/// The maximum number of views in a page.
const PAGE_MAX: usize = 1_000;
/// How long a request with `?position=` waits, unless the request has `?wait=`.
const WAIT: Duration = Duration::from_secs(5);

/// The parameters of requests for one view.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ViewParameters {
    position: Option<i64>,
    wait: Option<String>,
}

/// The parameters of requests for a page of views.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PageParameters {
    #[serde(default)]
    after: String,
    limit: Option<usize>,
    position: Option<i64>,
    wait: Option<String>,
}

/// One page of views, in the order of their keys.
#[derive(Debug, Serialize, ToSchema)]
struct Page<V> {
    views: Vec<Entry<V>>,
    /// The value of `?after=` for the next page; `null` on the last page.
    next: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Entry<V> {
    key: String,
    view: V,
}

/// Returns the routes of a read model, which a service puts under a path of its own.
///
/// - `GET /{key}` returns a view as JSON.
/// - `GET /?after=KEY&limit=N` returns a page: `{"views": [{"key": …, "view": …}], "next": …}`. The first page has no
///   `after`, and `next` is the `after` of the next page, or `null`. A page has 100 views unless `limit` asks for
///   another number, at most 1,000.
///
/// With `?position=N`, both requests first wait until the views show all events up to this position, such as the position
/// in a [`Receipt`](crate::Receipt), so that a client reads its own writes. If the views do not get there within
/// `?wait=` (5 s by default, at most [`WAIT_MAX`](crate::WAIT_MAX)), the answer is a 503.
///
/// The header `ETag` identifies the content, and `If-None-Match` with this tag gets a 304 without a body.
pub fn views<R: ReadModel<View: ToSchema>>(views: Views<R>) -> Api {
    let routes = Router::new().route("/", get(page::<R>)).route("/{key}", get(view::<R>)).with_state(views);
    let described = |summary: String| {
        Described::new(R::NAME, &summary)
            .parameter(query("position", json!({"type": "integer", "format": "int64"}), "Wait for this position."))
            .parameter(query(
                "wait",
                json!({"type": "string", "pattern": "^[0-9]{1,9}s?$"}),
                "How long to wait, such as `10s`.",
            ))
            .parameter(request_header(
                "If-None-Match",
                json!({"type": "string"}),
                "The `ETag` of the content that the client has.",
            ))
            .empty("304", "The client has the current content.")
            .problem("409", "The position is beyond the end of the log.")
            .problem("503", "The views have not reached the position.")
    };
    let one = described(format!("Returns a view of {}", R::NAME))
        .parameter(path_id("key", "The key of the view."))
        .answer::<R::View>("The view.", &[ETAG])
        .problem("404", "There is no such view.");
    let number = json!({"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE});
    let page = described(format!("Returns the views of {} in the order of their keys", R::NAME))
        .parameter(query("after", json!({"type": "string"}), "The key after which the page begins."))
        .parameter(query("limit", number, "The number of views in the page."))
        .answer::<Page<R::View>>("A page of views.", &[ETAG]);
    Api::from(routes).describe(HttpMethod::Get, "/{key}", one).describe(HttpMethod::Get, "/", page)
}

async fn view<R: ReadModel>(
    State(views): State<Views<R>>,
    key: Id,
    parameters: Result<Query<ViewParameters>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let key = id(key)?;
    let Query(parameters) = parameters.map_err(|error| bad(error.body_text()))?;
    caught_up(&views, parameters.position, parameters.wait).await?;
    let view = views.get(&key).await.map_err(problem)?;
    let missing = || Problem::new(StatusCode::NOT_FOUND, format!("read model {} has no view {key}", R::NAME));
    tagged(&headers, &view.ok_or_else(missing)?)
}

async fn page<R: ReadModel>(
    State(views): State<Views<R>>,
    parameters: Result<Query<PageParameters>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(PageParameters { after, limit, position, wait }) = parameters.map_err(|error| bad(error.body_text()))?;
    let limit = limit.unwrap_or(PAGE);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(bad(format!("limit={limit} is not between 1 and {PAGE_MAX}")));
    }
    if after.contains('\0') {
        return Err(bad(format!("after={after:.40?} has a NUL character, which no key has")));
    }
    caught_up(&views, position, wait).await?;
    // One more view shows whether there is a next page.
    let mut found = views.list(&after, limit + 1).await.map_err(problem)?;
    let is_last = found.len() <= limit;
    found.truncate(limit);
    let next = if is_last { None } else { found.last().map(|(key, _)| key.to_string()) };
    let views = found.into_iter().map(|(key, view)| Entry { key: key.to_string(), view }).collect();
    tagged(&headers, &Page::<R::View> { views, next })
}

/// Waits until the views show all events up to a position, if the request names one.
async fn caught_up<R: ReadModel>(views: &Views<R>, position: Option<i64>, wait: Option<String>) -> Result<(), Problem> {
    let limit = wait.map_or(Ok(WAIT), |wait| seconds(&wait))?;
    let Some(position) = position else { return Ok(()) };
    match views.wait_for(Position(position), limit).await {
        Ok(()) => Ok(()),
        Err(error @ WaitError::BeyondEnd { .. }) => Err(Problem::new(StatusCode::CONFLICT, error.to_string())),
        Err(WaitError::Store(error)) => Err(problem(error)),
        Err(error) => Err(Problem::unavailable(error.to_string())),
    }
}

fn tagged(headers: &HeaderMap, body: &impl Serialize) -> Result<Response, Problem> {
    let body = serde_json::to_vec(body).map_err(|error| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the view cannot be written as JSON: {error}"))
    })?;
    let tag = quoted(Uuid::new_v5(&Uuid::NAMESPACE_OID, &body));
    let json = HeaderValue::from_static("application/json");
    Ok(with_tag(headers, tag, || ([(header::CONTENT_TYPE, json)], body).into_response()))
}

fn problem(error: StoreError) -> Problem {
    let detail = without_files(&error);
    match error {
        StoreError::Unavailable(_) => Problem::unavailable(detail),
        _ => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, detail),
    }
}
