use annals::{Saga, SagaState, saga::Request};

#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Trip;
impl SagaState for Trip {}

fn ask(_: &Trip) -> Request {
    unreachable!()
}

fn main() {
    Saga::named("trip").pivot("pay", ask).undo(ask);
}
