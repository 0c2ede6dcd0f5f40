"""`zdd-web rehearse`: upgrade an app under load, again and again, and account for every request."""
