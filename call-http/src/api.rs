//! Routes together with their description in the form of OpenAPI 3.1.

use axum::{Router, http::header, routing::get};
use serde_json::{Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        Content, Header, Info, ObjectBuilder, OpenApi, PathItem, Ref, RefOr, Required, ResponseBuilder, Schema,
        header::HeaderBuilder,
        path::{HttpMethod, Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn},
        request_body::RequestBodyBuilder,
        schema::Type,
    },
};

use crate::{
    problem::Problem,
    request::{ID_BYTES_MAX, IDEMPOTENCY_KEY},
};

/// Routes together with their description, from which `/openapi.json` is made.
///
/// A service puts the parts of its API together with [`nest`](Self::nest) and [`merge`](Self::merge). A plain [`Router`]
/// converts into an `Api` whose routes have no description; [`Api::new`] takes the description that
/// [`utoipa::OpenApi`] derives.
///
/// ```
/// # use annals_http::Api;
/// # use axum::{Router, routing::get};
/// let greeting = Router::new().route("/greeting", get(|| async { "hello" }));
/// let api = Api::default().merge(greeting).nest("/v1", Router::new().route("/answer", get(|| async { "42" })));
/// ```
#[derive(Debug)]
pub struct Api {
    pub(crate) routes: Router,
    pub(crate) description: OpenApi,
}

impl Default for Api {
    fn default() -> Self {
        Router::new().into()
    }
}

impl From<Router> for Api {
    fn from(routes: Router) -> Self {
        Self::new(routes, OpenApi::new(Info::new("", ""), utoipa::openapi::Paths::new()))
    }
}

impl Api {
    /// Combines routes with their description.
    pub fn new(routes: Router, description: OpenApi) -> Self {
        Self { routes, description }
    }

    /// Sets the title and the version of the API.
    #[must_use]
    pub fn titled(mut self, title: &str, version: &str) -> Self {
        self.description.info.title = title.to_owned();
        self.description.info.version = version.to_owned();
        self
    }

    /// Adds the routes of another API under a path, such as `/accounts`.
    #[must_use]
    pub fn nest(self, path: &str, other: impl Into<Self>) -> Self {
        let Self { routes, description } = other.into();
        let composed = |path: &str, inner: &str| match inner {
            "/" => path.to_owned(),
            inner => format!("{path}{inner}"),
        };
        Self {
            routes: self.routes.nest(path, routes),
            description: self.description.nest_with_path_composer(path, description, composed),
        }
    }

    /// Adds the routes of another API.
    #[must_use]
    pub fn merge(self, other: impl Into<Self>) -> Self {
        let Self { routes, description } = other.into();
        Self { routes: self.routes.merge(routes), description: self.description.merge_from(description) }
    }

    /// Changes the routes, for example by a layer that only lets some clients through. The description stays as it is.
    ///
    /// ```
    /// # use annals_http::{Api, Problem};
    /// # use axum::{Router, extract::Request, http::StatusCode, middleware::{Next, from_fn}, routing::get};
    /// # use axum::response::{IntoResponse, Response};
    /// async fn check(request: Request, next: Next) -> Response {
    ///     match request.headers().get("x-api-key") {
    ///         Some(key) if key == "open sesame" => next.run(request).await,
    ///         _ => Problem::new(StatusCode::UNAUTHORIZED, "this route needs a key").into_response(),
    ///     }
    /// }
    ///
    /// let secret = Api::from(Router::new().route("/secret", get(|| async { "42" })));
    /// let api = secret.map_routes(|routes| routes.layer(from_fn(check)));
    /// ```
    #[must_use]
    pub fn map_routes(self, change: impl FnOnce(Router) -> Router) -> Self {
        Self { routes: change(self.routes), ..self }
    }

    /// Describes an operation of these routes.
    #[must_use]
    pub(crate) fn describe(mut self, method: HttpMethod, path: &str, operation: Described) -> Self {
        let Described { operation, schemas } = operation;
        let mut components = self.description.components.take().unwrap_or_default();
        components.schemas.extend(schemas);
        components.schemas.entry(PROBLEM.to_owned()).or_insert_with(Problem::schema);
        self.description.components = Some(components);
        let item = PathItem::new(method, operation);
        match self.description.paths.paths.get_mut(path) {
            Some(known) => known.merge_operations(item),
            None => _ = self.description.paths.paths.insert(path.to_owned(), item),
        }
        self
    }

    /// Returns the routes, and adds `/openapi.json`.
    pub(crate) fn into_routes(mut self) -> Router {
        let info = &mut self.description.info;
        if info.title.is_empty() {
            let program = std::env::current_exe().ok();
            let name = program.as_ref().and_then(|program| program.file_stem()).unwrap_or_default();
            info.title = name.to_string_lossy().into_owned();
        }
        if info.version.is_empty() {
            info.version = "0".to_owned();
        }
        let text = self.description.to_json().unwrap_or_default();
        let json = [(header::CONTENT_TYPE, "application/json")];
        self.routes.route("/openapi.json", get(move || async move { (json, text) }))
    }
}

/// The name of the schema of [`Problem`].
const PROBLEM: &str = "Problem";

/// The description of an operation, with the schemas that it refers to.
pub(crate) struct Described {
    operation: Operation,
    schemas: Vec<(String, RefOr<Schema>)>,
}

impl Described {
    /// Describes an operation. Every answer that is not described is a problem.
    pub fn new(tag: &str, summary: &str) -> Self {
        let operation = OperationBuilder::new().tag(tag).summary(Some(summary)).build();
        let described = Self { operation, schemas: Vec::new() };
        described.problem("default", "The request had no effect, or its outcome is not known yet.")
    }

    pub fn parameter(mut self, parameter: Parameter) -> Self {
        self.operation.parameters.get_or_insert_default().push(parameter);
        self
    }

    /// Describes the body of the request.
    pub fn body<T: ToSchema>(mut self) -> Self {
        let content = self.content::<T>();
        let body = RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True));
        self.operation.request_body = Some(body.build());
        self
    }

    /// Describes an answer with a JSON body.
    pub fn answer<T: ToSchema>(mut self, description: &str, headers: &[&str]) -> Self {
        let content = self.content::<T>();
        let answer = ResponseBuilder::new().description(description).content("application/json", content);
        let answer = headers.iter().fold(answer, |answer, name| answer.header(*name, header_of(name)));
        self.respond("200", answer)
    }

    /// Describes an answer with a body of this media type.
    pub fn media(self, status: &str, description: &str, media_type: &str) -> Self {
        let schema = if media_type == "application/json" { ObjectBuilder::new().build().into() } else { string() };
        let content = Content::new(Some(schema));
        self.respond(status, ResponseBuilder::new().description(description).content(media_type, content))
    }

    /// Describes an answer without a body.
    pub fn empty(self, status: &str, description: &str) -> Self {
        self.respond(status, ResponseBuilder::new().description(description))
    }

    /// Describes an answer that is a problem.
    pub fn problem(self, status: &str, description: &str) -> Self {
        let content = Content::new(Some(Ref::from_schema_name(PROBLEM)));
        let answer = ResponseBuilder::new().description(description).content("application/problem+json", content);
        self.respond(status, answer)
    }

    fn respond(mut self, status: &str, answer: ResponseBuilder) -> Self {
        self.operation.responses.responses.insert(status.to_owned(), answer.build().into());
        self
    }

    fn content<T: ToSchema>(&mut self) -> Content {
        T::schemas(&mut self.schemas);
        Content::new(Some(T::schema()))
    }
}

fn header_of(name: &str) -> Header {
    let description = match name {
        ETAG => "Identifies this state of the resource.",
        _ => "Is `true` in the answer to a repeated request.",
    };
    HeaderBuilder::new().schema(string()).description(Some(description)).build()
}

/// The header with the entity tag, as a name in a description.
pub(crate) const ETAG: &str = "ETag";

fn string() -> Schema {
    ObjectBuilder::new().schema_type(Type::String).build().into()
}

/// Returns a parameter of the path: an id.
pub(crate) fn path_id(name: &str, description: &str) -> Parameter {
    let schema = ObjectBuilder::new()
        .schema_type(Type::String)
        .min_length(Some(1))
        .max_length(Some(ID_BYTES_MAX / 4))
        .pattern(Some(r"^[^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$"));
    let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path).required(Required::True);
    parameter.description(Some(description)).schema(Some(schema.build())).build()
}

/// Returns a parameter of the query.
pub(crate) fn query(name: &str, kind: Value, description: &str) -> Parameter {
    optional(ParameterIn::Query, name, kind, description)
}

/// Returns a header of the request.
pub(crate) fn request_header(name: &str, kind: Value, description: &str) -> Parameter {
    optional(ParameterIn::Header, name, kind, description)
}

fn optional(place: ParameterIn, name: &str, kind: Value, description: &str) -> Parameter {
    let schema: RefOr<Schema> = serde_json::from_value(kind).unwrap_or_else(|_| string().into());
    let parameter = ParameterBuilder::new().name(name).parameter_in(place).required(Required::False);
    parameter.description(Some(description)).schema(Some(schema)).build()
}

/// Returns the header with the idempotency key.
pub(crate) fn idempotency_key() -> Parameter {
    let kind = json!({"type": "string", "minLength": 1, "maxLength": ID_BYTES_MAX, "pattern": "^[!-~]+$"});
    request_header(IDEMPOTENCY_KEY, kind, "Names the request: a repeated request gets the answer to the first one.")
}
