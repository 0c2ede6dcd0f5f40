from django.db import models


class Item(models.Model):
    name = models.TextField()

    class Meta:
        db_table = "items"

    def __str__(self):
        return self.name


class Job(models.Model):
    """Work that has finished: what is cut off at a deadline leaves no row."""

    id = models.CharField(primary_key=True, max_length=32)
    status = models.CharField(max_length=20)
    seconds = models.FloatField()
    version = models.CharField(max_length=50)
    generation = models.PositiveIntegerField()
    finished_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        db_table = "jobs"

    def __str__(self):
        return f"{self.id} {self.status}"
