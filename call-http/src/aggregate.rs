//! The commands and the state of aggregates over HTTP.

use annals::{Aggregate, ExecuteError, Repository, Request, Version, WorkError, event::named_id};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;
use utoipa::{ToSchema, openapi::path::HttpMethod};
use uuid::Uuid;

use crate::{
    api::{Api, Described, ETAG, idempotency_key, path_id, request_header},
    conditions::{expected_version, version_tag, with_tag},
    problem::Problem,
    request::{Id, REPLAYED, Submission, asked, id},
};

/// The namespace of the command ids that follow from idempotency keys.
const COMMANDS: Uuid = Uuid::from_u128(0x1f0c_2b1e_7d5a_4c1e_9a53_0d7b_6a5e_42c9);

/// The answer to a command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// The id of the aggregate.
    pub id: String,
    /// The version of the stream after the command.
    pub version: i64,
    /// The position in the log of the commit that stored the events, for `?position=` of [`views`](crate::views). `null`
    /// if the command had nothing to do.
    pub position: Option<i64>,
}

/// Returns the routes of the aggregates of one type, which a service puts under a path of its own.
///
/// - `POST /{id}` executes a command. The body is the command as JSON. The header `Idempotency-Key` names the request:
///   a repeated request executes nothing and gets the answer to the first one, with the header `Idempotency-Replayed:
///   true`. This holds while the command is among the last 1,024 of its aggregate. A command that was refused, or that
///   had nothing to do, is decided again. The header `If-Match: "3"` requires version 3, and `If-None-Match: *` requires that the aggregate does not
///   exist. The answer is a [`Receipt`].
/// - `GET /{id}` returns the state as JSON. The header `ETag` has the version, and `If-None-Match` with this version gets
///   a 304 without a body.
///
/// `/openapi.json` describes both, by the schemas of the command and of the state.
///
/// A refusal is a 422 whose `refusal` is the value that [`Aggregate::decide`] returned. An unexpected version is a 412.
///
/// ```
/// # use std::sync::Arc;
/// # use annals::{Aggregate, Event, MemoryStore, Repository};
/// # use annals_http::Api;
/// # use serde::{Deserialize, Serialize};
/// # use utoipa::ToSchema;
/// #[derive(Event, Clone)]
/// #[event(prefix = "counter")]
/// enum CounterEvent { Raised { by: u64 } }
///
/// #[derive(Deserialize, ToSchema)]
/// #[serde(rename_all = "snake_case")]
/// enum CounterCommand { Raise { by: u64 } }
///
/// #[derive(Clone, Debug, Serialize, thiserror::Error)]
/// #[error("the counter would be too high")]
/// struct TooHigh;
///
/// #[derive(Clone, Default, Serialize, ToSchema)]
/// struct Counter { value: u64 }
///
/// impl Aggregate for Counter {
///     const CATEGORY: &'static str = "counter";
///     type Command = CounterCommand;
///     type Event = CounterEvent;
///     type Refusal = TooHigh;
///
///     fn decide(&self, command: &CounterCommand) -> Result<Vec<CounterEvent>, TooHigh> {
///         let CounterCommand::Raise { by } = *command;
///         if self.value + by > 100 { Err(TooHigh) } else { Ok(vec![CounterEvent::Raised { by }]) }
///     }
///
///     fn evolve(&mut self, event: &CounterEvent) {
///         let CounterEvent::Raised { by } = event;
///         self.value += by;
///     }
/// }
///
/// // POST /counters/visits with the body {"raise": {"by": 2}} raises the counter `visits`.
/// let counters = Repository::<Counter>::new(Arc::new(MemoryStore::new()));
/// let api = Api::default().nest("/counters", annals_http::aggregate(counters));
/// ```
pub fn aggregate<A>(repository: Repository<A>) -> Api
where
    A: Aggregate<Command: DeserializeOwned + ToSchema, Refusal: Serialize> + Serialize + ToSchema,
{
    let routes = Router::new().route("/{id}", get(state::<A>).post(execute::<A>)).with_state(repository);
    let tag = |example| json!({"type": "string", "pattern": r#"^"[1-9][0-9]{0,17}"$"#, "examples": [example]});
    let id = || path_id("id", "The id of the aggregate.");
    let command = Described::new(A::CATEGORY, &format!("Executes a command of {}", A::CATEGORY))
        .parameter(id())
        .parameter(idempotency_key())
        .parameter(request_header("If-Match", tag("\"3\""), "The version that the aggregate must have."))
        .parameter(request_header(
            "If-None-Match",
            json!({"type": "string", "enum": ["*"]}),
            "The aggregate must not exist.",
        ))
        .body::<A::Command>()
        .answer::<Receipt>("The command is executed.", &[ETAG, REPLAYED])
        .problem("412", "The aggregate does not have the expected version.")
        .problem("422", "The aggregate refuses the command, or the body does not have the expected shape.");
    let read = Described::new(A::CATEGORY, &format!("Returns the state of {}", A::CATEGORY))
        .parameter(id())
        .parameter(request_header(
            "If-None-Match",
            json!({"type": "string"}),
            "The version that the client has, such as `\"3\"`.",
        ))
        .answer::<A>("The state.", &[ETAG])
        .empty("304", "The client has the current state.")
        .problem("404", "There is no such aggregate.");
    Api::from(routes).describe(HttpMethod::Post, "/{id}", command).describe(HttpMethod::Get, "/{id}", read)
}

async fn execute<A>(
    State(repository): State<Repository<A>>,
    path: Id,
    submission: Submission,
) -> Result<Response, Problem>
where
    A: Aggregate<Command: DeserializeOwned, Refusal: Serialize>,
{
    let id = id(path)?;
    let command: A::Command = submission.json()?;
    let stream = repository.stream(&id).map_err(|error| problem::<A>(ExecuteError::Invalid(error.to_string())))?;
    // In two steps, because a stream and a key may both contain any separator.
    let command_id = named_id(named_id(COMMANDS, stream.as_str()), &submission.id);
    let request =
        Request { expected_version: expected_version(&submission.headers)?, ..asked(command_id, &submission.headers) };
    let decided = repository.execute(&id, command, request).await.map_err(problem::<A>)?;
    let position = decided.position.map(|position| position.0);
    let mut response = Json(Receipt { id, version: decided.version.0, position }).into_response();
    let headers = response.headers_mut();
    headers.insert(header::ETAG, version_tag(decided.version));
    if decided.repeated {
        headers.insert(HeaderName::from_static(REPLAYED), HeaderValue::from_static("true"));
    }
    Ok(response)
}

async fn state<A>(State(repository): State<Repository<A>>, path: Id, headers: HeaderMap) -> Result<Response, Problem>
where
    A: Aggregate<Refusal: Serialize> + Serialize,
{
    let id = id(path)?;
    let found = repository.state_and_version(&id).await;
    let (state, version) = found.map_err(|error: WorkError<A::Refusal>| problem::<A>(error.into()))?;
    if version == Version::START {
        return Err(Problem::new(StatusCode::NOT_FOUND, format!("there is no {} {id}", A::CATEGORY)));
    }
    Ok(with_tag(&headers, version_tag(version), || Json(state).into_response()))
}

/// Adds the refusal as JSON to the problem.
fn problem<A: Aggregate<Refusal: Serialize>>(error: ExecuteError<A::Refusal>) -> Problem {
    let refusal = match &error {
        ExecuteError::Refused(refusal) => serde_json::to_value(refusal).ok(),
        _ => None,
    };
    Problem { refusal, ..error.into() }
}
