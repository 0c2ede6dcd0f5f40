from django.urls import path
from shop import views

urlpatterns = [
    path("", views.index),
    path("items", views.items),
    path("slow", views.slow),
    path("stream", views.stream),
    path("upload", views.upload),
    path("jobs", views.jobs),
]
handler400 = "shop.views.bad_request"
